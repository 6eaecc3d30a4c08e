"""Which copy a gateway takes: the cheapest as far as it can know, and not the one that all other gateways take."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from cluster.gateway.affinity import CopyLoad, known_load
from cluster.gateway.choice import Choice

PREFIX = tuple(range(32))
"""Of 2,048 tokens."""


def gateways(count: int, loads: dict[str, CopyLoad]) -> list[Choice]:
    """That all heard the same just now."""
    choices = [Choice(seed) for seed in range(count)]
    for choice in choices:
        for name, load in loads.items():
            choice.heard(name, load)
    return choices


def take(choice: Choice, prefix: tuple[int, ...] = (), *, num_tokens: int = 100) -> str:
    """Send one where it costs least."""
    name = choice.choose(num_tokens, prefix)
    assert name is not None
    choice.sent(name, prefix)
    return name


@pytest.mark.parametrize("seed", range(10))
def test_a_gateway_that_is_alone_always_takes_the_least_busy_copy(seed: int) -> None:
    draw = random.Random(seed)
    names = [f"copy-{one}" for one in range(draw.randint(2, 20))]
    (choice,) = gateways(1, dict.fromkeys(names, CopyLoad()))
    running: Counter[str] = Counter()
    choice.sent("copy-0", ())  # what is at copies is its own, from the first request on
    running["copy-0"] += 1

    for _ in range(200):
        if draw.random() < 0.4 and (busy := sorted(running.elements())):
            name = draw.choice(busy)
            running[name] -= 1
            choice.left(name)
        elif any(running.values()):
            name = take(choice)
            assert running[name] == min(running[one] for one in names)
            running[name] += 1
        if draw.random() < 0.1:
            for name in names:
                choice.heard(name, CopyLoad(num_running=running[name]))


def test_many_gateways_with_the_same_old_figures_do_not_all_take_the_idlest_copy() -> None:
    loads = {f"copy-{one}": CopyLoad(num_running=20) for one in range(100)} | {"copy-50": CopyLoad(num_running=10)}

    taken = Counter(take(choice) for choice in gateways(260, loads) for _ in range(2))

    assert taken["copy-50"] >= 5  # a little more than its share: it is the idlest
    assert max(taken.values()) <= 25  # no copy is sent hundreds before it can say so
    assert len(taken) > 90


def test_what_a_gateway_sent_since_a_copy_spoke_counts_beside_what_it_said() -> None:
    assert known_load(CopyLoad(num_running=20), num_own=3, num_sent=3) == CopyLoad(num_running=23)
    assert known_load(CopyLoad(num_running=20), num_own=1, num_sent=-4) == CopyLoad(num_running=16)
    full = CopyLoad(num_running=256, num_waiting=2)
    assert known_load(full, num_own=9, num_sent=1) == CopyLoad(num_running=256, num_waiting=3)
    assert known_load(full, num_own=9, num_sent=-5) == CopyLoad(num_running=253)
    assert known_load(CopyLoad(), num_own=2, num_sent=0) == CopyLoad(num_running=2)


@pytest.mark.parametrize("num_gateways", [1, 2, 100])
def test_a_prompt_goes_back_to_the_copy_that_knows_its_beginning_among_however_many(num_gateways: int) -> None:
    loads = {f"copy-{one}": CopyLoad(num_running=10) for one in range(200)}
    for choice in gateways(num_gateways, loads):
        first = take(choice, PREFIX, num_tokens=2100)

        assert [take(choice, PREFIX, num_tokens=2100) for _ in range(5)] == [first] * 5


def test_a_prompt_leaves_the_copy_that_knows_it_where_that_one_has_more_to_do() -> None:
    (choice,) = gateways(1, {"a": CopyLoad(), "b": CopyLoad()})
    choice.sent("a", PREFIX)
    choice.heard("a", CopyLoad(num_running=200))

    assert choice.choose(2100, PREFIX) == "b"


def test_a_copy_that_takes_no_work_or_is_lost_is_not_taken_and_counts_no_more() -> None:
    (choice,) = gateways(1, {"a": CopyLoad(), "b": CopyLoad(num_running=50)})
    choice.sent("a", PREFIX)
    choice.lost("a")
    choice.heard("c", None)

    assert {choice.choose(2100, PREFIX) for _ in range(20)} == {"b"}
    assert choice.choose(2100, PREFIX, {"b"}) is None


def test_what_drains_at_a_copy_that_takes_no_work_is_no_share_of_the_others_load() -> None:
    names = [f"copy-{one}" for one in range(40)]
    loads = {name: CopyLoad(num_running=20) for name in names} | {"copy-7": CopyLoad(num_running=10)}
    choices = gateways(260, loads)
    for choice in choices:
        for name in names[30:]:
            for _ in range(200):
                choice.sent(name, ())
            choice.heard(name, None)

    taken = Counter(take(choice) for choice in choices)

    assert not set(taken) & set(names[30:])
    assert max(taken.values()) < 60, "they all took the idlest"
