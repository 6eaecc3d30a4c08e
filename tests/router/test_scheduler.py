"""The scheduler by example: what a step holds, the plan ahead of results, how things end, what it tells of itself."""

from __future__ import annotations

import random

import pytest

from cluster.errors import ConfigError, EngineError
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import FinishReason
from tests.fakes import ContractBroken
from tests.router.fake_copy import PROMPT, FakeCopy, first_token, request
from workers.step import ExtendSlot, Prefill, StepPlan, StepResult

# One step


def test_a_prompt_is_prefilled_whole_and_then_decoded_token_by_token() -> None:
    copy = FakeCopy()
    copy.add(request("a", PROMPT, max_tokens=3))

    prefill, decode = copy.step(), copy.step()

    assert prefill is not None
    assert [opened.num_cached for opened in prefill.open] == [0]
    assert prefill.prefills == [Prefill(prefill.open[0].slot, 0, PROMPT, True)]
    assert decode == StepPlan(step=1, decodes=[prefill.open[0].slot])
    copy.run()
    assert (copy.token_ids["a"], copy.finish["a"]) == copy.alone("a")


def test_nothing_to_do_gives_no_plan() -> None:
    assert FakeCopy().send() is None


def test_a_prompt_beyond_the_budget_is_prefilled_in_chunks_and_only_the_last_samples() -> None:
    copy = FakeCopy(max_num_batched_tokens=4)
    copy.add(request("a", PROMPT, max_tokens=1))

    copy.run()

    chunks = [prefill for plan in copy.plans for prefill in plan.prefills]
    assert [(chunk.start, len(chunk.token_ids), chunk.sample) for chunk in chunks] == [
        (0, 4, False),
        (4, 4, False),
        (8, 1, True),
    ]


def test_decodes_come_first_and_prefills_take_the_rest_of_the_budget() -> None:
    copy = FakeCopy(max_num_batched_tokens=8)
    copy.add(request("runs", [1, 2, 3], max_tokens=9))
    copy.step()
    copy.add(request("comes", PROMPT))

    mixed = copy.step()

    assert mixed is not None
    assert len(mixed.decodes) == 1
    assert [len(prefill.token_ids) for prefill in mixed.prefills] == [7]
    assert mixed.num_tokens == 8


def test_a_block_is_added_when_the_table_is_full() -> None:
    copy = FakeCopy(block_size=4)
    copy.add(request("a", [1, 2, 3, 4], max_tokens=3))
    copy.step()

    full, roomy = copy.step(), copy.step()

    assert full is not None
    assert roomy is not None
    assert full.extend == [ExtendSlot(full.decodes[0], full.extend[0].block_ids)]
    assert len(full.extend[0].block_ids) == 1
    assert roomy.extend == []


def test_a_budget_below_the_slots_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens is 4, below max_num_seqs 8"):
        SchedulerConfig(max_model_len=10, max_num_seqs=8, max_num_batched_tokens=4)


# One plan ahead


def test_the_next_decode_is_planned_before_the_last_token_is_known() -> None:
    copy = FakeCopy(max_in_flight=2)
    copy.add(request("a", PROMPT, max_tokens=5))

    copy.send()
    ahead = copy.send()

    assert ahead is not None
    assert len(ahead.decodes) == 1
    assert copy.token_ids["a"] == []


def test_no_third_plan_while_two_are_in_flight() -> None:
    copy = FakeCopy(max_in_flight=2)
    copy.add(request("a", PROMPT, max_tokens=5))
    copy.send()
    copy.send()

    assert copy.send() is None
    copy.receive()
    assert copy.send() is not None


def test_no_token_is_planned_beyond_max_tokens() -> None:
    copy = FakeCopy(max_in_flight=2)
    copy.add(request("a", PROMPT, max_tokens=1))
    copy.send()

    assert copy.send() is None
    [update] = copy.receive()
    assert (update.token_ids, update.finish) == ([first_token(PROMPT)], FinishReason.LENGTH)


def test_a_token_sampled_after_the_stop_is_discarded() -> None:
    copy = FakeCopy(max_in_flight=2)
    copy.add(request("a", PROMPT, stop_token_ids=frozenset({first_token(PROMPT)})))
    copy.send()
    copy.send()

    [update] = copy.receive()
    overrun = copy.receive()

    assert (update.token_ids, update.finish) == ([first_token(PROMPT)], FinishReason.STOP)
    assert overrun == []


def test_a_result_of_another_step_is_refused_with_both_numbers() -> None:
    copy = FakeCopy()
    copy.add(request("a", PROMPT))
    copy.send()

    with pytest.raises(EngineError, match="answered step 5, expected 0"):
        copy.scheduler.apply(StepResult(5, 0, [1]))


def test_a_result_with_a_missing_token_is_refused_with_both_numbers() -> None:
    copy = FakeCopy()
    copy.add(request("a", PROMPT))
    copy.send()

    with pytest.raises(EngineError, match="gave 0 tokens for step 0, expected 1"):
        copy.scheduler.apply(StepResult(0, 0, []))


# Ends


def test_output_ends_with_length_where_the_context_ends() -> None:
    copy = FakeCopy(max_model_len=12)
    copy.add(request("a", PROMPT, max_tokens=100))

    copy.run()

    assert (len(copy.token_ids["a"]), copy.finish["a"]) == (3, FinishReason.LENGTH)


def test_output_ends_with_length_where_the_pool_ends() -> None:
    copy = FakeCopy(num_blocks=3, block_size=4)
    copy.add(request("a", PROMPT, max_tokens=100))

    copy.run()

    assert (len(copy.token_ids["a"]), copy.finish["a"]) == (3, FinishReason.LENGTH)


def test_a_cancelled_sequence_has_no_blocks_before_the_next_plan_which_closes_its_slot() -> None:
    copy = FakeCopy()
    copy.add(request("goes", PROMPT, max_tokens=50))
    copy.add(request("stays", [1], max_tokens=50))
    copy.step()

    copy.cancel("goes")

    assert copy.blocks.num_free == copy.blocks.num_blocks - 1
    after = copy.send()
    assert after is not None
    assert len(after.close) == 1
    assert copy.finish["goes"] is FinishReason.CANCELLED


def test_tokens_in_flight_of_a_cancelled_sequence_are_discarded() -> None:
    copy = FakeCopy(max_in_flight=2)
    copy.add(request("a", PROMPT, max_tokens=50))
    copy.send()
    copy.send()

    copy.cancel("a")

    assert copy.receive() == []
    assert copy.receive() == []


def test_a_slot_can_be_closed_and_opened_by_the_same_plan() -> None:
    copy = FakeCopy(max_num_seqs=1)
    copy.add(request("first", [1], max_tokens=1))
    copy.add(request("second", [2], max_tokens=1))
    copy.step()

    handover = copy.step()

    assert handover is not None
    assert handover.close == [opened.slot for opened in handover.open] == [0]


def test_a_waiting_request_can_be_cancelled() -> None:
    copy = FakeCopy(max_num_seqs=1)
    copy.add(request("runs", [1], max_tokens=2))
    copy.add(request("waits", [2], max_tokens=2))
    copy.step()

    copy.cancel("waits")
    copy.run()

    assert copy.token_ids["waits"] == []
    assert copy.finish == {"waits": FinishReason.CANCELLED, "runs": FinishReason.LENGTH}


def test_cancelling_what_has_ended_is_harmless() -> None:
    copy = FakeCopy()
    assert copy.scheduler.cancel("never seen") is None


# What it tells of itself


def test_the_running_are_counted_by_phase() -> None:
    copy = FakeCopy()
    end = first_token(PROMPT)
    copy.add(request("thinks", [1, 2, 3], starts_thinking=True, think_end_id=49))
    copy.add(request("closes", PROMPT, starts_thinking=True, think_end_id=end))
    copy.send()
    assert (copy.scheduler.stats.num_thinking, copy.scheduler.stats.num_answering) == (2, 0)

    copy.receive()

    assert (copy.scheduler.stats.num_thinking, copy.scheduler.stats.num_answering) == (1, 1)


# Many


def test_a_thousand_sequences_through_a_tight_pool_get_what_they_would_get_alone() -> None:
    rng = random.Random(3)
    copy = FakeCopy(num_blocks=100, block_size=4, max_num_seqs=32, max_num_batched_tokens=128, max_waiting=1000)
    system = [rng.randrange(50) for _ in range(20)]
    for key in range(1000):
        prompt_ids = system + [rng.randrange(50) for _ in range(rng.randrange(1, 20))]
        copy.add(request(key, prompt_ids, max_tokens=rng.randrange(1, 50), stop_token_ids=frozenset({0})))

    copy.run()

    assert all((copy.token_ids[key], copy.finish[key]) == copy.alone(key) for key in range(1000))
    assert copy.scheduler.num_preempted_total > 0
    assert copy.blocks.num_free == 100


def test_the_fake_ranks_notice_a_breach_of_the_contract() -> None:
    copy = FakeCopy()
    copy.add(request("a", PROMPT))
    copy.step()

    with pytest.raises(ContractBroken, match="slot 3 is decoded, but not open"):
        copy.ranks.execute(StepPlan(step=1, decodes=[3]))
