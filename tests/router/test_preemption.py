"""Sequences that give way and come back: nothing of them is lost."""

from __future__ import annotations

import pytest

from tests.router.fake_copy import PROMPT, FakeCopy, request
from workers.step import SamplingParams


def crowded_copy(*, old_max_tokens: int = 15, **more: int) -> FakeCopy:
    """Two sequences that fit together at first, but not to their ends. Their seeds are 1 and 2."""
    copy = FakeCopy(num_blocks=7, block_size=4, **more)
    copy.add(request("old", [1, 2, 3, 4], max_tokens=old_max_tokens, sampling=SamplingParams(seed=1)))
    copy.add(request("young", [5, 6, 7, 8], max_tokens=15, sampling=SamplingParams(seed=2)))
    return copy


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_the_last_admitted_is_preempted_and_loses_nothing(max_in_flight: int) -> None:
    copy = crowded_copy(max_in_flight=max_in_flight)

    copy.run()

    assert copy.scheduler.num_preempted_total > 0
    assert list(copy.finish) == ["old", "young"]
    for key in ("old", "young"):
        assert (copy.token_ids[key], copy.finish[key]) == copy.alone(key)


def test_who_thinks_gives_way_to_a_later_one_that_writes_its_answer() -> None:
    copy = FakeCopy(num_blocks=7, block_size=4)
    copy.add(request("thinks", [1, 2, 3, 4], max_tokens=15, starts_thinking=True, think_end_id=99))
    copy.add(request("answers", [5, 6, 7, 8], max_tokens=15))

    copy.run()

    assert copy.scheduler.num_preempted_total > 0
    assert list(copy.finish) == ["answers", "thinks"]
    for key in ("thinks", "answers"):
        assert (copy.token_ids[key], copy.finish[key]) == copy.alone(key)


def test_a_higher_priority_counts_more_than_an_answer() -> None:
    copy = FakeCopy(num_blocks=7, block_size=4)
    copy.add(request("thinks", [1, 2, 3, 4], max_tokens=15, starts_thinking=True, think_end_id=99, priority=1))
    copy.add(request("answers", [5, 6, 7, 8], max_tokens=15))

    copy.run()

    assert copy.scheduler.num_preempted_total > 0
    assert list(copy.finish) == ["thinks", "answers"]


def test_a_preempted_sequence_comes_back_before_those_who_came_later() -> None:
    copy = crowded_copy(max_num_seqs=2)
    copy.add(request("latecomer", [9], max_tokens=1, sampling=SamplingParams(seed=3)))

    copy.run()

    assert [opened.sampling.seed for plan in copy.plans for opened in plan.open] == [1, 2, 2, 3]


def test_a_preempted_sequence_gets_the_token_that_was_in_flight() -> None:
    copy = FakeCopy(num_blocks=7, block_size=4, max_in_flight=2)
    for prompt_ids in ([1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3, 3]):
        copy.add(request(prompt_ids[0], prompt_ids, max_tokens=20))
    while copy.scheduler.num_preempted_total == 0:
        if copy.send() is None:
            copy.receive()
    [preempted] = [seq for seq in copy.scheduler.sequences if seq.slot is None]
    num_known, num_pending = len(preempted.output_ids), preempted.num_pending

    while copy.in_flight:
        copy.receive()

    assert num_pending > 0
    assert len(preempted.output_ids) == num_known + num_pending


def test_a_preempted_sequence_hits_its_own_blocks_when_they_are_still_there() -> None:
    copy = crowded_copy(max_in_flight=1)

    copy.run()

    [back] = [opened for plan in copy.plans[1:] for opened in plan.open]
    assert back.num_cached > 4  # more than the prompt


def test_a_preempted_sequence_whose_blocks_were_all_reused_puts_its_prompt_back_into_the_cache() -> None:
    copy = crowded_copy(old_max_tokens=24)
    copy.run()
    [back] = [opened for plan in copy.plans[1:] for opened in plan.open]
    assert back.num_cached == 0

    copy.add(request("same prompt", [5, 6, 7, 8, 9]))
    copy.run()

    assert copy.cached_tokens["same prompt"] == 4


def test_a_sequence_that_finds_no_block_waits_with_what_it_has_when_it_is_the_last() -> None:
    copy = FakeCopy(num_blocks=3, block_size=2, max_in_flight=1)
    copy.add(request("old", [1], max_tokens=4))
    copy.add(request("young", [2], max_tokens=4))
    copy.step()
    copy.step()  # both have used up their first block; of the one that is left, the older takes it

    plan = copy.step()

    assert plan is not None
    assert len(plan.decodes) == 1
    assert copy.scheduler.num_preempted_total == 0


def test_penalties_come_back_with_the_slot() -> None:
    copy = FakeCopy(num_blocks=5, block_size=4)
    penalised = SamplingParams(seed=7, presence_penalty=0.5)
    for key in ("old", "young"):
        copy.add(request(key, [1, 2, 3, 4], max_tokens=12, sampling=penalised))

    copy.run()

    *_, again = [opened for plan in copy.plans for opened in plan.open]
    assert again.prompt_ids == [1, 2, 3, 4]
    assert again.output_ids == copy.token_ids["young"][: len(again.output_ids)] != []


def test_prompts_are_not_sent_where_nothing_counts_them() -> None:
    copy = FakeCopy()
    copy.add(request("a", PROMPT))

    plan = copy.send()

    assert plan is not None
    assert plan.open[0].prompt_ids == []
