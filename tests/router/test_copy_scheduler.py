"""Several attention groups in step: who goes where, and that each sequence gets what it gets alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequest, Overloaded, PromptTooLong
from cluster.router.sequence import FinishReason
from tests.router.fake_copy import request
from tests.router.fake_groups import FakeGroups
from tests.router.test_scheduler_properties import Cancel, Receive, Send, arrivals, bursts, moves, tight_copies


def make_move(copy: FakeGroups, move: object) -> None:
    match move:
        case Send():
            copy.send()
        case Receive():
            if copy.in_flight:
                copy.receive()
        case Cancel(index):
            if index in copy.requests:
                copy.cancel(index)
        case dict():
            offer(copy, move)


def offer(copy: FakeGroups, move: dict[str, Any]) -> None:
    """Add it, unless the copy has a reason to refuse."""
    new = request(len(copy.requests), **move)
    try:
        copy.add(new)
    except PromptTooLong:
        assert len(new.prompt_ids) >= copy.scheduler.context_limit
    except Overloaded:
        slots = len(copy.ranks) * copy.config.max_num_seqs
        assert copy.scheduler.num_unfinished == slots + copy.config.max_waiting


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), tight_copies(), st.sampled_from([None, 1.1, 2.0]), bursts, moves)
def test_every_sequence_gets_what_it_would_get_alone_and_all_blocks_come_back(
    num_groups: int,
    setting: dict[str, Any],
    slowdown: float | None,
    burst: list[dict[str, Any]],
    script: list[object],
) -> None:
    copy = FakeGroups(num_groups, **setting, max_prefill_slowdown=slowdown)

    for move in [*burst, *script]:
        make_move(copy, move)
    copy.run()

    assert set(copy.finish) == set(copy.requests)
    for key, finish in copy.finish.items():
        token_ids, ending = copy.alone(key)
        got = copy.token_ids[key]
        expected = (token_ids[: len(got)], finish) if finish is FinishReason.CANCELLED else (token_ids, ending)
        assert (got, finish) == expected
    assert all(pool.num_free == pool.num_blocks for pool in copy.pools)
    event("preempted" if copy.scheduler.stats.num_preempted_total else "not preempted")
    event("a group was idle" if any(not p.num_tokens for plans in copy.steps for p in plans) else "none was idle")


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 4), tight_copies(), bursts, st.lists(arrivals(), max_size=4))
def test_the_same_arrivals_give_the_same_plans(
    num_groups: int, setting: dict[str, Any], burst: list[dict[str, Any]], later: list[dict[str, Any]]
) -> None:
    copies = [FakeGroups(num_groups, **setting) for _ in range(2)]

    for copy in copies:
        for move in [*burst, Send(), *later]:
            make_move(copy, move)
        copy.run()

    assert copies[0].steps == copies[1].steps


def test_requests_are_spread_over_the_groups() -> None:
    copy = FakeGroups(3, max_num_batched_tokens=32)
    for key in range(6):
        copy.add(request(key, [key, 1, 2]))

    plans = copy.step()

    assert plans is not None
    assert [len(plan.open) for plan in plans] == [2, 2, 2]


def test_a_group_without_work_gets_an_empty_plan_and_everyone_knows_all_sizes() -> None:
    copy = FakeGroups(2)
    copy.add(request(0, [1, 2, 3], max_tokens=5))

    copy.run()

    assert all(not idle.num_tokens and not idle.open and not idle.close for _, idle in copy.steps)
    assert [plan.group_tokens for plan in copy.steps[0]] == [[3, 0], [3, 0]]


def test_one_group_needs_no_sizes() -> None:
    copy = FakeGroups(1)
    copy.add(request(0, [1, 2, 3]))

    copy.run()

    assert all(plan.group_tokens == [] for (plan,) in copy.steps)


def test_a_request_goes_to_the_group_that_has_its_prefix() -> None:
    # given: group 1 has the second prompt in its cache
    copy = FakeGroups(2, max_num_seqs=8, num_blocks=64, max_num_batched_tokens=64)
    first, second = list(range(12)), list(range(20, 32))
    copy.add(request("first", first))
    copy.add(request("second", second))
    copy.run()
    # when
    copy.add(request("again", [*second, 1]))
    plans = copy.step()
    # then
    assert plans is not None
    assert [[opened.num_cached for opened in plan.open] for plan in plans] == [[], [12]]


def test_a_prefix_that_everybody_has_does_not_fill_one_group_alone() -> None:
    copy = FakeGroups(2, max_num_seqs=8, num_blocks=64, max_num_batched_tokens=64)
    prefix = list(range(12))
    copy.add(request("first", prefix, max_tokens=1))
    copy.run()

    for key in range(8):
        copy.add(request(key, [*prefix, key], max_tokens=20))
        copy.step()

    slots = [len(ranks.slots) for ranks in copy.ranks]
    assert sum(slots) == 8
    assert max(slots) - min(slots) <= 2 + 1  # a quarter of the slots for the prefix, and one that tips it


def test_a_group_whose_pool_is_full_gets_nothing_while_another_has_room() -> None:
    copy = FakeGroups(2, num_blocks=8, max_num_seqs=4, max_num_batched_tokens=64)
    copy.add(request("long", list(range(28)), max_tokens=4))
    copy.step()

    for key in range(2):
        copy.add(request(key, [key] * 5, max_tokens=4))
        copy.step()

    assert [len(ranks.slots) for ranks in copy.ranks] == [1, 2]


def test_who_waits_goes_to_the_first_group_that_can_take_it() -> None:
    # given: one slot each; the first group is busy for long
    copy = FakeGroups(2, max_num_seqs=1, num_blocks=32)
    copy.add(request("long", [1], max_tokens=60))
    copy.add(request("short", [2], max_tokens=3))
    copy.add(request("next", [3], max_tokens=3))
    # when
    for _ in range(10):
        copy.step()
    # then
    assert copy.finish.keys() == {"short", "next"}


def test_a_request_in_the_queue_can_be_cancelled() -> None:
    copy = FakeGroups(2, max_num_seqs=1)
    for key in range(3):
        copy.add(request(key, [1, 2], max_tokens=3))
    copy.step()

    copy.cancel(2)
    copy.run()

    assert copy.finish[2] is FinishReason.CANCELLED
    assert copy.token_ids[2] == []


def test_a_budget_reaches_a_request_in_the_queue_and_one_in_a_group() -> None:
    copy = FakeGroups(2, max_num_seqs=1)
    for key in range(3):
        thinks: dict[str, Any] = {"starts_thinking": True, "think_end_id": 49, "bad_words": [[49]]}
        copy.add(request(key, [1, key], max_tokens=9, close_thinking_ids=[7, 49], **thinks))
    copy.step()

    for key in range(3):
        copy.scheduler.set_budget(key, 4)
    copy.run()

    assert [copy.token_ids[key][4:6] for key in range(3)] == [[7, 49]] * 3


def test_a_copy_that_is_full_names_its_limit() -> None:
    copy = FakeGroups(2, max_num_seqs=2, max_waiting=1)
    for key in range(5):
        copy.add(request(key, [1]))

    with pytest.raises(Overloaded, match="the limit is 5"):
        copy.add(request(5, [1]))


def test_a_key_is_unique_in_the_whole_copy() -> None:
    copy = FakeGroups(2)
    copy.add(request(0, [1]))
    copy.step()

    with pytest.raises(InvalidRequest, match="unfinished"):
        copy.add(request(0, [1]))
