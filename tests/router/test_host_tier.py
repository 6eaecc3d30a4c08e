"""KV that is kept in the host's memory: what it saves, when it is not used, and that nothing of it is ever wrong."""

from __future__ import annotations

from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from cluster.router.host_tier import HostPlan, HostTier, plan_host
from tests.router.fake_copy import FakeCopy, request
from tests.router.test_scheduler_properties import (
    VOCAB_SIZE,
    arrivals,
    assert_as_alone,
    bursts,
    make_move,
    moves,
    tight_copies,
)
from workers.step import HostMemory, SamplingParams

LONG = list(range(10, 42))
"""8 blocks of 4."""
FAST = HostMemory(num_blocks=64, copy_s=0.001, token_s=0.001, step_s=0.010)


def copy_with_host(**more: Any) -> FakeCopy:
    host = HostPlan(num_blocks=32, least_blocks=2, blocks_per_step=2)
    return FakeCopy(num_blocks=12, block_size=4, host=host, **more)


def host_of(copy: FakeCopy) -> HostTier:
    assert copy.blocks.host is not None
    return copy.blocks.host


def evict_a_conversation(copy: FakeCopy) -> None:
    """Compute LONG, and then something else that needs its blocks."""
    copy.add(request("first turn", LONG, max_tokens=1))
    copy.run()
    copy.add(request("another", [7] * 45, max_tokens=1))
    copy.run()


def test_an_evicted_prompt_is_brought_back_and_not_computed_again() -> None:
    copy = copy_with_host()
    evict_a_conversation(copy)
    num_computed = copy.ranks.num_computed_total

    copy.add(request("second turn", [*LONG, 1, 2], max_tokens=1))
    copy.run()

    assert copy.cached_tokens["second turn"] == 32
    assert copy.ranks.num_computed_total - num_computed == 2
    assert copy.token_ids["second turn"] == copy.alone("second turn")[0]
    assert copy.scheduler.stats.fetched_tokens_total == 32


def test_a_preempted_sequence_is_brought_back_and_not_computed_again() -> None:
    # given: two that fit together at first, but not to their ends
    def compute(host: HostPlan | None) -> FakeCopy:
        copy = FakeCopy(num_blocks=12, block_size=4, host=host)
        copy.add(request("old", [1, 2, 3, 4], max_tokens=40, sampling=SamplingParams(seed=1)))
        copy.add(request("young", [5, 6, 7, 8], max_tokens=40, sampling=SamplingParams(seed=2)))
        copy.run()
        assert copy.scheduler.num_preempted_total > 0
        return copy

    without, copy = compute(None), compute(HostPlan(num_blocks=32))

    for key in ("old", "young"):
        assert (copy.token_ids[key], copy.finish[key]) == copy.alone(key)
    # The last block of a preempted sequence is not full: those tokens are computed again.
    most_again = copy.scheduler.num_preempted_total * 4
    assert copy.ranks.num_computed_total <= 4 + 39 + 4 + 39 + most_again < without.ranks.num_computed_total


def test_blocks_come_back_under_the_steps_of_others_a_few_at_a_time() -> None:
    copy = copy_with_host()
    evict_a_conversation(copy)
    copy.add(request("streams", [9], max_tokens=12))
    copy.step()
    copy.add(request("second turn", LONG, max_tokens=1))
    first = len(copy.steps)

    copy.run()

    plans = copy.steps[first:]
    waits = [len(plan.fetch) for plan in plans if plan.fetch]
    assert waits == [2, 2, 2, 1], "one block is computed: its last token gives the first of the output"
    assert all(plan.decodes for plan in plans if plan.fetch), "somebody stood still for a copy"
    opened = next(index for index, plan in enumerate(plans) if plan.open)
    assert opened == 4, "it is computed in the step behind its last copy"


def test_without_other_work_nobody_waits_for_copies() -> None:
    copy = copy_with_host()
    evict_a_conversation(copy)
    copy.add(request("second turn", [*LONG, 1], max_tokens=1))

    plan = copy.step()

    assert plan is not None
    assert (len(plan.fetch), plan.num_tokens) == (8, 1)


def test_a_cancelled_sequence_lets_go_of_what_it_waited_for() -> None:
    copy = copy_with_host()
    evict_a_conversation(copy)
    copy.add(request("streams", [9], max_tokens=12))
    copy.step()
    copy.add(request("second turn", LONG, max_tokens=1))
    copy.step()

    copy.cancel("second turn")
    plan = copy.step()

    assert host_of(copy).num_reading == 0
    assert plan is not None
    assert plan.close == [], "a slot is closed that no rank has opened"
    copy.run()


def test_who_is_preempted_while_blocks_come_back_leaves_only_what_has_come() -> None:
    # given: one stream that grows, and one whose eight blocks come back one by one
    host = HostPlan(num_blocks=32, least_blocks=2, blocks_per_step=1)
    copy = FakeCopy(num_blocks=12, block_size=4, host=host)
    evict_a_conversation(copy)
    copy.add(request("grows", [9] * 11, max_tokens=8, priority=1))
    copy.step()
    copy.add(request("second turn", LONG, max_tokens=1))
    copy.step()

    copy.run()

    assert copy.scheduler.num_preempted_total == 1
    for key in ("grows", "second turn"):
        assert copy.token_ids[key] == copy.alone(key)[0]


def test_ranks_that_are_new_have_nothing_in_the_hosts_memory() -> None:
    copy = copy_with_host()
    evict_a_conversation(copy)
    copy.add(request("second turn", [*LONG, 1], max_tokens=1))

    copy.lose_ranks()
    copy.run()

    assert copy.cached_tokens["second turn"] == 0
    assert copy.token_ids["second turn"] == copy.alone("second turn")[0]


def test_short_sequences_are_not_kept() -> None:
    copy = FakeCopy(num_blocks=12, block_size=4, host=HostPlan(num_blocks=32, least_blocks=9))

    evict_a_conversation(copy)  # 8 blocks of the first are evicted
    assert copy.scheduler.stats.offloaded_tokens_total == 0

    copy.add(request("third", [8] * 45, max_tokens=1))  # and 11 full ones of the other
    copy.run()
    assert copy.scheduler.stats.offloaded_tokens_total == 44


def test_another_tenant_does_not_find_what_is_kept() -> None:
    copy = copy_with_host()
    evict_a_conversation(copy)

    copy.add(request("stranger", LONG, max_tokens=1, cache_salt="other"))
    copy.run()

    assert copy.cached_tokens["stranger"] == 0


def test_where_the_hosts_memory_is_full_the_longest_unused_gives_way() -> None:
    tier = HostTier(HostPlan(num_blocks=2))
    tier.was_used([0, 1, 2])
    tier.keep(0, b"a")
    tier.keep(1, b"b")
    read = tier.read([b"a"])

    tier.keep(2, b"c")

    assert tier.find([b"a"]) == 1, "what is being read was written over"
    assert tier.find([b"b"]) == 0
    assert tier.find([b"c"]) == 1
    tier.let_go(read)
    assert tier.num_reading == 0


def test_a_block_that_is_read_is_free_only_when_it_was_read() -> None:
    tier = HostTier(HostPlan(num_blocks=1))
    tier.was_used([0, 1])
    tier.keep(0, b"a")
    read = tier.read([b"a"])
    tier.forget([b"a"])

    tier.keep(1, b"b")
    assert tier.find([b"b"]) == 0
    tier.let_go(read)

    assert tier.num_used == 0


def test_of_two_copies_to_one_host_block_the_last_counts() -> None:
    tier = HostTier(HostPlan(num_blocks=1))
    tier.was_used([0, 1])
    tier.keep(0, b"a")
    tier.keep(1, b"b")

    assert tier.take_offloads() == [(1, 0)]
    assert tier.take_offloads() == []


def test_least_blocks_and_pace_follow_from_what_ranks_have_measured() -> None:
    # a block of 16 tokens: 16 ms to compute, 2 ms to copy there and back: a step of 10 ms is won back by one block
    assert plan_host([FAST], block_size=16) == HostPlan(num_blocks=64, least_blocks=1, blocks_per_step=10)
    # 3 ms to compute: ten blocks are as long as the step
    assert plan_host([FAST], block_size=3) == HostPlan(num_blocks=64, least_blocks=11, blocks_per_step=10)


def test_where_to_compute_again_is_cheaper_nothing_is_kept() -> None:
    assert plan_host([FAST], block_size=2) is None
    assert plan_host([FAST, None], block_size=16) is None
    assert plan_host([None], block_size=16) is None
    assert plan_host([], block_size=16) is None


@st.composite
def hosts(draw: st.DrawFn) -> dict[str, Any]:
    host = HostPlan(
        num_blocks=draw(st.integers(1, 24)),
        least_blocks=draw(st.sampled_from([1, 1, 2])),
        blocks_per_step=draw(st.integers(1, 4)),
    )
    sizes = {"num_blocks": draw(st.integers(4, 12)), "block_size": draw(st.integers(1, 2)), "max_model_len": 40}
    return draw(tight_copies()) | sizes | {"host": host, "enable_prefix_cache": True, "vocab_size": VOCAB_SIZE}


@settings(max_examples=60, deadline=None)
@given(hosts(), bursts, moves, st.lists(arrivals(), max_size=8))
def test_every_sequence_gets_what_it_would_get_alone_and_no_block_of_either_memory_is_lost(
    setting: dict[str, Any], burst: list[dict[str, Any]], script: list[object], later: list[dict[str, Any]]
) -> None:
    copy = FakeCopy(**setting)

    for move in [*burst, *script]:
        make_move(copy, move)
    copy.run()
    for move in later:
        make_move(copy, move)
    copy.run()

    for key in copy.finish:
        assert_as_alone(copy, key)
    assert copy.blocks.num_free == copy.blocks.num_blocks
    assert host_of(copy).num_reading == 0
    assert set(copy.finish) == set(copy.requests)
    num_fetched = copy.scheduler.stats.fetched_tokens_total
    event(f"brought back: {min(3, num_fetched // 4)}")
