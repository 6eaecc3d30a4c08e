"""Who gets a slot and who waits: order of arrival, room, priority, and what is refused at the door."""

from __future__ import annotations

import pytest

from cluster.errors import InvalidRequest, Overloaded, PromptTooLong
from tests.router.fake_copy import PROMPT, FakeCopy, request

# Admission


def test_requests_beyond_the_slots_wait_and_come_in_order() -> None:
    copy = FakeCopy(max_num_seqs=2)
    for key in range(4):
        copy.add(request(key, [key], max_tokens=2))

    copy.step()
    assert (copy.scheduler.num_running, copy.scheduler.num_waiting) == (2, 2)
    copy.run()
    assert list(copy.cached_tokens) == [0, 1, 2, 3]


def test_a_short_request_does_not_overtake_a_long_one_that_waits_for_blocks() -> None:
    copy = FakeCopy(num_blocks=4, block_size=4)
    copy.add(request("runs", [1] * 6, max_tokens=8))
    copy.step()
    copy.add(request("long", [2] * 12, max_tokens=2))
    copy.add(request("short", [3], max_tokens=1))

    copy.step()
    assert copy.scheduler.num_waiting == 2
    copy.run()
    assert list(copy.cached_tokens) == ["runs", "long", "short"]


def test_a_newcomer_leaves_one_block_to_each_that_runs() -> None:
    copy = FakeCopy(num_blocks=4, block_size=4)
    copy.add(request("runs", [1] * 5, max_tokens=9))
    copy.step()
    copy.add(request("comes", [2] * 8))

    copy.step()

    assert (copy.scheduler.num_running, copy.scheduler.num_waiting) == (1, 1)


def test_a_full_queue_refuses_with_the_numbers_and_takes_again_later() -> None:
    copy = FakeCopy(max_num_seqs=1, max_waiting=1)
    copy.add(request("a", [1], max_tokens=1))
    copy.add(request("b", [2], max_tokens=1))

    with pytest.raises(Overloaded, match="0 requests run and 2 wait, the limit is 2; try again later"):
        copy.add(request("c", [3]))
    copy.run()
    copy.add(request("c", [3]))


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers() -> None:
    copy = FakeCopy(max_model_len=8)

    with pytest.raises(PromptTooLong, match=r"the prompt has 8 tokens, prompt plus output may have 8 .*shorten it"):
        copy.add(request("a", [1] * 8))
    assert not copy.scheduler.has_unfinished


def test_a_prompt_that_the_whole_pool_cannot_hold_is_refused_with_both_numbers() -> None:
    copy = FakeCopy(num_blocks=2, block_size=4)

    with pytest.raises(PromptTooLong, match=r"has 9 tokens, .* may have 8 \(context 1024, KV pool 2 blocks of 4\)"):
        copy.add(request("a", PROMPT))


@pytest.mark.parametrize(
    ("prompt_ids", "max_tokens", "message"),
    [([], 4, "the prompt has 0 tokens"), ([1], 0, "max_tokens is 0"), ([1], -3, "max_tokens is -3")],
)
def test_a_senseless_request_is_refused(prompt_ids: list[int], max_tokens: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        FakeCopy().add(request("a", prompt_ids, max_tokens=max_tokens))


def test_a_key_in_use_is_refused_and_free_after_the_end() -> None:
    copy = FakeCopy()
    copy.add(request("a", [1], max_tokens=1))

    with pytest.raises(InvalidRequest, match="key 'a' belongs to an unfinished request"):
        copy.scheduler.add(request("a", [2]))
    copy.run()
    copy.scheduler.add(request("a", [2]))


# Priority


def test_the_highest_priority_of_those_who_wait_is_admitted_first() -> None:
    copy = FakeCopy(max_num_seqs=1)
    for index, priority in enumerate([0, 0, 7, 0]):
        copy.add(request(index, [1, index], max_tokens=2, priority=priority))

    copy.run()

    assert list(copy.cached_tokens) == [2, 0, 1, 3]


def test_nobody_is_preempted_for_a_higher_priority_that_waits() -> None:
    copy = FakeCopy(max_num_seqs=1)
    copy.add(request("runs", [1], max_tokens=5))
    copy.step()

    copy.add(request("urgent", [2], max_tokens=5, priority=9))
    copy.run()

    assert copy.scheduler.num_preempted_total == 0
    assert list(copy.finish) == ["runs", "urgent"]


def test_where_blocks_run_out_the_lowest_priority_gives_way_however_early_it_came() -> None:
    copy = FakeCopy(num_blocks=8, block_size=2, max_num_seqs=3)
    copy.add(request("low", [1, 2], max_tokens=12, priority=-1))
    copy.add(request("first", [3, 4], max_tokens=12))
    copy.add(request("second", [5, 6], max_tokens=12))
    while copy.scheduler.num_preempted_total == 0:
        copy.step()

    [preempted] = [seq for seq in copy.scheduler.sequences if seq.slot is None]
    copy.run()

    assert preempted.request.key == "low"
    assert all((copy.token_ids[key], copy.finish[key]) == copy.alone(key) for key in copy.requests)
