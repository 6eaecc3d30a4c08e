"""One copy of the model across two hosts: attention groups on each, experts over both."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.end_to_end.hosts import RAY_PORT, Host, ray_hosts, why_impossible
from tests.end_to_end.servers import MULL, wait_until

IMPOSSIBLE = why_impossible()

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.timeout(400),
    pytest.mark.skipif(IMPOSSIBLE is not None, reason=f"no network namespaces here: {IMPOSSIBLE}"),
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    # The Router and one group fit the first host, the other group must go to the second.
    with ray_hosts({"node-a": 3, "node-b": 2}) as hosts:
        yield hosts


def test_two_groups_on_two_hosts_answer_the_demo_question_and_leave_no_rank_behind(hosts: list[Host]) -> None:
    head, other = hosts
    layout = ("--insecure", "--tp", "2", "--dp", "2", "--redundant-experts", "4", "--threads-per-rank", "1")

    with head.serving("--ray-address", f"{head.address}:{RAY_PORT}", *layout) as server:
        answer = head.run(*MULL, "chat", "What is 347 + 285?", "--address", server.address, "--temperature", "0")
        ranks = json.loads(head.run(*MULL, "status", "--address", server.address, "--json"))["ranks"]
        assert "ShardActor" in other.processes()

    assert "632" in answer
    assert [rank["group"] for rank in ranks] == [0, 0, 1, 1]
    assert [{rank["host"] for rank in ranks if rank["group"] == group} for group in (0, 1)] in (
        [{"node-a"}, {"node-b"}],
        [{"node-b"}, {"node-a"}],
    )
    # Ray kills on other hosts without waiting for them.
    wait_until(lambda: "ShardActor" not in other.processes(), "the ranks of the other host to end")
    assert "raylet" in head.processes(), "the Ray cluster was not ours to stop"


def test_a_layout_that_the_hosts_have_no_room_for_is_refused_with_the_numbers(hosts: list[Host]) -> None:
    head = hosts[0]
    flags = ("--insecure", "--ray-address", f"{head.address}:{RAY_PORT}", "--tp", "4", "--dp", "2")

    done = head.attempt(*MULL, "serve", *flags)

    assert done.returncode == 2
    assert "8 ranks, 4 of them on a node at a time" in done.stderr
    assert "have 3, 2" in done.stderr


def test_only_a_cluster_that_asks_for_a_token_is_closed(hosts: list[Host]) -> None:
    probe = (
        f"from cluster.ray_cluster import is_open_to_all; print(is_open_to_all({f'{hosts[0].address}:{RAY_PORT}'!r}))"
    )

    assert hosts[0].run(MULL[0], "-c", probe).strip() == "False"
