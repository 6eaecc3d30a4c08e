"""What a Router tells on its metrics port, of itself and for its ranks."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import EngineError, RankLossCause
from cluster.metrics.router import SPECS
from cluster.ports import HeldPorts
from cluster.router.router import Router
from mull.v1 import router_pb2 as pb
from tests.certificates import Authority
from tests.router.router_site import CONFIG, MODEL, THINK_END, Connect, Groups, until
from tests.scraping import Scrape, check_against_table, check_as_prometheus_does, scraped

HOST = "127.0.0.1"


async def scrape_of(router: Router) -> Scrape:
    return await scraped(router.describe().metrics_address)


async def test_steps_and_requests_are_counted_and_timed(router: Router, connect: Connect) -> None:
    router.open_metrics(HOST, [0])
    gateway = await connect()
    for key in (1, 2):
        await gateway.submit(key, prompt_ids=[key, 2, 3], max_tokens=10)
    for key in (1, 2):
        await gateway.end_of(key)

    said = await scrape_of(router)

    assert said.one("mull_step_tokens_total", kind="prefill") == 6
    # One sampled token of each is never put through the model; one plan is sent ahead and may be in vain.
    assert said.one("mull_step_tokens_total", kind="decode") >= 2 * 9
    num_steps = said.one("mull_engine_steps_total")
    for part in ("compute", "collect"):
        assert said.one("mull_step_seconds_count", part=part) == num_steps
    assert said.one("mull_step_sequences_sum") >= 2 * 10
    assert [said.one(f"mull_request_{part}_time_seconds_count") for part in ("queue", "prefill", "decode")] == [2, 2, 2]
    assert said.one("mull_prefix_query_tokens_total") == 6


async def test_the_copy_and_each_of_its_ranks_is_described(router: Router, connect: Connect) -> None:
    router.open_metrics(HOST, [0])
    await connect()

    said = await scrape_of(router)

    assert (said.one("mull_engine_ready"), said.one("mull_ranks"), said.one("mull_ranks_ready")) == (1, 2, 2)
    assert said.all("mull_weight_bytes") == {("0",): 1, ("1",): 1}
    assert said.all("mull_load_seconds") == {("0",): 0.5, ("1",): 0.5}
    assert said.one("mull_kv_blocks") == said.one("mull_kv_free_blocks") > 0
    assert said.one("mull_kv_usage_ratio") == 0
    assert [labels[0] for labels in said.all("mull_build_info")] == [MODEL.name]


async def test_running_requests_hold_slots_and_blocks(router: Router, groups: Groups, connect: Connect) -> None:
    router.open_metrics(HOST, [0])
    gateway = await connect()
    no_end = [pb.TokenSequence(ids=[THINK_END])]
    await gateway.begin(groups.made[0], 1, starts_thinking=True, bad_words=no_end, max_tokens=390)
    await gateway.begin(groups.made[0], 2, max_tokens=390)

    said = await scrape_of(router)

    assert said.one("mull_requests_running") == 2
    assert (said.one("mull_requests_thinking"), said.one("mull_requests_answering")) == (1, 1)
    used = 1 - said.one("mull_kv_free_blocks") / said.one("mull_kv_blocks")
    assert said.one("mull_kv_usage_ratio") == pytest.approx(used)
    assert used > 0
    groups.made[0].release()


async def test_a_lost_rank_is_counted_by_its_cause_with_what_it_cost(
    router: Router, groups: Groups, connect: Connect
) -> None:
    router.open_metrics(HOST, [0])
    gateway = await connect()
    await gateway.begin(groups.made[0], 1, max_tokens=390)
    while len(gateway.tokens(1)) < 10:
        await gateway.read()
    assert router.describe().num_running == 1

    groups.made[0].lose_rank()
    await gateway.end_of(1)

    said = await scrape_of(router)
    assert said.all("mull_ranks_lost_total") == {
        (cause.value,): float(cause is RankLossCause.FAILED) for cause in RankLossCause
    }
    assert said.one("mull_engine_restarts_total") == 1
    assert said.one("mull_recovery_pause_seconds_count", cause="rank_lost") == 1
    assert said.one("mull_replayed_tokens_total", cause="rank_lost") >= 10


async def test_before_its_first_start_it_is_not_ready_and_says_why(groups: Groups) -> None:
    groups.may_start.clear()
    router = Router(MODEL, CONFIG, groups)
    await router.start()
    router.open_metrics(HOST, [0])
    try:
        said = await scrape_of(router)
        status, body = await asyncio.to_thread(get, f"http://{router.describe().metrics_address}/ready")
    finally:
        groups.may_start.set()
        await router.stop()

    assert (said.one("mull_engine_ready"), said.one("mull_kv_blocks"), said.one("mull_ranks_ready")) == (0, 0, 0)
    assert (status, body) == (503, {"ready": False, "reason": "the ranks are loading"})


async def test_further_routers_take_the_next_ports(groups: Groups, held_ports: HeldPorts) -> None:
    routers = [Router(MODEL, CONFIG, groups) for _ in range(2)]
    ports = [held_ports.hold(HOST) for _ in routers]
    for router in routers:
        await router.start()
        router.open_metrics(HOST, ports)
    addresses = [router.describe().metrics_address for router in routers]
    try:
        assert addresses == [f"{HOST}:{port}" for port in ports]
        assert (await scraped(addresses[1])).one("mull_ranks_lost_total", cause="late") == 0
    finally:
        for router in routers:
            await router.stop()


@pytest.mark.parametrize(("host", "told"), [("0.0.0.0", HOST), ("::1", "[::1]"), ("localhost", "localhost")])
async def test_its_address_leads_to_it_wherever_it_listens(router: Router, host: str, told: str) -> None:
    router.open_metrics(host, [0])

    address = router.describe().metrics_address

    assert address.rpartition(":")[0] == told
    assert (await scraped(address)).one("mull_ranks_ready") >= 0


async def test_a_host_that_is_not_here_is_one_line(router: Router) -> None:
    with pytest.raises(EngineError, match=r"metrics on 192\.0\.2\.1, ports 9465 to 9465 \(Cannot assign") as refused:
        router.open_metrics("192.0.2.1", [9465])

    assert "\n" not in str(refused.value)


async def test_a_router_works_while_its_port_is_taken_and_gets_it_when_it_is_free(
    router: Router, connect: Connect, held_ports: HeldPorts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.router.metrics_port.RETRY_S", 0.01)
    with socket.create_server((HOST, held_ports.hold(HOST))) as taken:
        port = taken.getsockname()[1]
        router.open_metrics(HOST, [port])
        gateway = await connect()
        await gateway.submit(1)
        assert (await gateway.end_of(1)).reason == pb.End.REASON_LENGTH
        assert router.describe().metrics_address == ""

    await until(lambda: router.describe().metrics_address == f"{HOST}:{port}", "the port")

    assert (await scrape_of(router)).one("mull_engine_steps_total") > 0


async def test_a_loop_that_is_busy_for_too_long_is_a_scrape_that_fails_in_one_line(
    router: Router, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cluster.router.metrics_port.ANSWER_TIMEOUT_S", 0.01)
    router.open_metrics(HOST, [0])
    address = router.describe().metrics_address
    # A thread of its own: `to_thread` would need the loop to hand the answer on.
    with ThreadPoolExecutor(1) as threads:
        asked = [threads.submit(get, f"http://{address}/{path}") for path in ("metrics", "ready")]
        answers = [it.result(60) for it in asked]

    assert answers == [(503, {"error": "busy: no answer in time"})] * 2
    assert capfd.readouterr().err == ""
    monkeypatch.undo()
    assert (await scrape_of(router)).one("mull_ranks_ready") >= 0


async def test_connections_beyond_a_bound_are_closed_and_the_others_answered(
    router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.exposition.MAX_REQUESTS", 2)
    router.open_metrics(HOST, [0])
    host, _, port = router.describe().metrics_address.rpartition(":")

    def connect() -> socket.socket:
        return socket.create_connection((host, int(port)), timeout=60)

    with connect(), connect(), connect() as third:
        assert await asyncio.to_thread(third.recv, 1) == b""

    async def is_answered() -> bool:
        try:
            return (await scrape_of(router)).one("mull_ranks_ready") >= 0
        except OSError:
            return False

    async with asyncio.timeout(60):
        while not await is_answered():  # noqa: ASYNC110  # there is no event for threads that end
            await asyncio.sleep(0.01)


async def test_a_port_that_can_never_be_had_is_said(
    router: Router, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.router.metrics_port.RETRY_S", 0.01)
    with socket.create_server((HOST, 0)) as taken:
        router.open_metrics(HOST, [taken.getsockname()[1]])
        monkeypatch.setattr("cluster.router.metrics_port.Exposition.start", refuse)
        await until(lambda: "cannot be had ([Errno 13] no)" in caplog.text, "the error")


def refuse(*_: object) -> int:
    raise PermissionError(errno.EACCES, "no")


async def test_the_port_serves_what_its_table_says(router: Router, connect: Connect, tmp_path: Path) -> None:
    """With a certificate between gateways and Routers, and with ranks."""
    await connect()
    router.open_metrics(HOST, [0], Authority(tmp_path).issue("link"))

    check_against_table(await scrape_of(router), SPECS)


async def test_prometheus_has_no_complaint(router: Router, connect: Connect) -> None:
    router.open_metrics(HOST, [0])
    gateway = await connect()
    await gateway.submit(1)
    await gateway.end_of(1)

    check_as_prometheus_does(await scrape_of(router))


def get(url: str) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(url, timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
