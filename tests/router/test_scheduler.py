"""The scheduler by example: what a step holds, who waits, who is preempted, what is found again, how things end."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cluster.errors import ConfigError, EngineError, InvalidRequest, Overloaded, PromptTooLong
from cluster.router.scheduler import SchedulerConfig
from cluster.router.sequence import FinishReason, SequenceRequest
from tests.fakes import ContractBroken, next_token
from tests.router.fake_copy import FakeCopy, request
from workers.step import ExtendSlot, Prefill, SamplingParams, StepPlan, StepResult, TokenRules

PROMPT = list(range(10, 19))  # 9 tokens: two full blocks of 4, and one token


def first_token(prompt_ids: list[int]) -> int:
    """What the fake ranks sample after this prompt for `request`."""
    return next_token(prompt_ids, 7, 50)


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


# Preemption


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


# Prefix cache


def test_the_full_blocks_of_a_finished_prompt_are_found_by_the_next() -> None:
    copy = FakeCopy(block_size=4)
    copy.add(request("first", PROMPT))
    copy.run()
    copy.add(request("second", [*PROMPT, 1, 2]))

    plan = copy.step()

    assert plan is not None
    assert plan.prefills == [Prefill(plan.open[0].slot, 8, [PROMPT[8], 1, 2], True)]
    assert copy.cached_tokens == {"first": 0, "second": 8}
    stats = copy.scheduler.stats
    assert (stats.prefix_query_tokens_total, stats.prefix_hit_tokens_total) == (20, 8)


def test_a_prompt_is_found_in_the_plan_after_the_one_that_computes_it() -> None:
    copy = FakeCopy(block_size=4, max_in_flight=2)
    copy.add(request("first", PROMPT, max_tokens=9))
    copy.send()
    copy.add(request("second", PROMPT, max_tokens=9))
    copy.send()

    copy.run()

    assert copy.cached_tokens["second"] == 8
    assert copy.token_ids["second"] == copy.alone("second")[0]


def test_a_head_that_was_refused_comes_as_soon_as_its_prefix_is_cached() -> None:
    # given: room for one of two prompts that share 48 tokens; the head is refused while nothing is cached yet
    copy = FakeCopy(num_blocks=20, block_size=4, max_num_batched_tokens=64)
    shared = list(range(1, 49))
    copy.add(request("runs", [*shared, 1], max_tokens=20))
    copy.add(request("waits", [*shared, 2], max_tokens=4))
    copy.step()
    assert copy.scheduler.num_waiting == 1

    copy.step()

    assert copy.scheduler.num_waiting == 0
    assert copy.cached_tokens["waits"] == 48


def test_a_head_that_does_not_fit_is_not_looked_up_again_while_the_cache_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = FakeCopy(num_blocks=16, block_size=4)
    copy.add(request("runs", PROMPT, max_tokens=30))
    copy.add(request("waits", [1] * 50))
    for _ in range(5):
        copy.step()
    lookups: list[int] = []
    monkeypatch.setattr(copy.blocks, "match", lambda hashes: lookups.append(len(hashes)) or [])

    for _ in range(10):
        copy.step()

    assert (copy.scheduler.num_waiting, lookups) == (1, [])


def test_the_last_prompt_token_is_computed_even_if_all_is_cached() -> None:
    copy = FakeCopy(block_size=4)
    copy.add(request("first", PROMPT[:8]))
    copy.run()
    copy.add(request("second", PROMPT[:8]))
    copy.run()

    assert copy.cached_tokens["second"] == 4
    assert copy.token_ids["second"] == copy.token_ids["first"]


def test_what_follows_the_prompt_is_neither_cached_nor_kept_over_older_prompts() -> None:
    copy = FakeCopy(num_blocks=6, block_size=4)
    copy.add(request("thinks", PROMPT, max_tokens=12, starts_thinking=True, think_end_id=49))
    copy.run()
    copy.add(request("other", [1] * 15, max_tokens=1))
    copy.run()

    assert copy.scheduler.stats.num_cached_blocks == 2 + 3
    copy.add(request("again", PROMPT, max_tokens=1))
    copy.run()
    assert copy.cached_tokens["again"] == 8


def test_requests_of_different_salts_do_not_share_blocks() -> None:
    copy = FakeCopy()
    copy.add(request("first", PROMPT, cache_salt="one"))
    copy.run()
    copy.add(request("second", PROMPT, cache_salt="two"))
    copy.run()

    assert copy.cached_tokens["second"] == 0


def test_without_prefix_cache_nothing_is_found_or_counted() -> None:
    copy = FakeCopy(enable_prefix_cache=False)
    for key in ("first", "second"):
        copy.add(request(key, PROMPT))
        copy.run()

    assert copy.cached_tokens["second"] == 0
    assert copy.scheduler.stats.prefix_query_tokens_total == 0
    assert copy.scheduler.stats.num_cached_blocks == 0


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


# Tokens that may not come


def test_stop_tokens_are_masked_and_do_not_count_before_min_tokens() -> None:
    stops = frozenset(range(25))
    copy = FakeCopy()
    copy.add(request("a", PROMPT, max_tokens=40, stop_token_ids=stops, min_tokens=6))

    copy.run()

    assert copy.finish["a"] is FinishReason.STOP
    assert [token_id in stops for token_id in copy.token_ids["a"][:6]] == [False] * 6
    assert copy.plans[0].open[0].rules == TokenRules(stop_ids=sorted(stops), first_stop_position=len(PROMPT) + 6)


def test_a_request_without_rules_carries_none() -> None:
    copy = FakeCopy()
    copy.add(request("a", PROMPT, stop_token_ids=frozenset({3})))
    plan = copy.step()

    assert plan is not None
    assert (plan.open[0].rules, plan.open[0].output_ids) == (None, [])


def test_a_preempted_sequence_brings_its_output_back_for_its_bad_words() -> None:
    copy = FakeCopy(num_blocks=8, block_size=2, max_num_seqs=2)
    copy.add(request("a", [1, 2], max_tokens=12))
    copy.add(request("b", [3, 4], max_tokens=12, bad_words=[[1, 2]]))
    copy.run()

    opened = [opened for plan in copy.plans for opened in plan.open if opened.rules is not None]

    assert len(opened) > 1
    assert opened[-1].output_ids == copy.token_ids["b"][: len(opened[-1].output_ids)] != []


# Thinking budgets

THINK_END = 49
CLOSE = [30, 31, THINK_END, 32]


def thinker(key: str, budget: int | None, **more: Any) -> SequenceRequest:
    """It closes its thoughts only when it is made to: the bad word keeps the tag away."""
    values: dict[str, Any] = {"max_tokens": 20, "starts_thinking": True, "think_end_id": THINK_END} | more
    values.setdefault("bad_words", [[THINK_END]])
    return request(key, PROMPT, thinking_budget=budget, close_thinking_ids=CLOSE, **values)


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
@pytest.mark.parametrize("budget", [0, 1, 5])
def test_thoughts_have_exactly_the_budget_and_are_then_closed(budget: int, max_in_flight: int) -> None:
    copy = FakeCopy(max_in_flight=max_in_flight)
    copy.add(thinker("a", budget))

    copy.run()

    assert copy.token_ids["a"][budget : budget + 4] == CLOSE == copy.forced["a"]
    assert len(copy.token_ids["a"]) == 20
    assert (copy.token_ids["a"], copy.finish["a"]) == copy.alone("a")


def test_thoughts_that_end_by_themselves_are_not_closed() -> None:
    copy = FakeCopy()
    copy.add(thinker("a", 10, bad_words=[*([token] for token in range(48)), [48, 48]]))

    copy.run()

    assert THINK_END in copy.token_ids["a"][:10]
    assert copy.forced == {}


def test_forced_tokens_are_prefilled_on_top_of_what_is_computed() -> None:
    copy = FakeCopy()
    copy.add(thinker("a", 2))
    while not copy.plans or not copy.plans[-1].close:
        copy.step()

    closing = copy.plans[-1]

    assert closing.close == [closing.open[0].slot] == [closing.prefills[0].slot]
    # The last thought was sampled, but not computed yet.
    assert closing.prefills[0].token_ids == [copy.token_ids["a"][1], *CLOSE]
    assert closing.open[0].num_cached == closing.prefills[0].start == len(PROMPT) + 1


def test_forced_tokens_are_chunked_by_the_token_budget() -> None:
    copy = FakeCopy(max_num_seqs=2, max_num_batched_tokens=2)
    copy.add(thinker("a", 3))

    copy.run()

    assert all(plan.num_tokens <= 2 for plan in copy.plans)
    assert (copy.token_ids["a"], copy.finish["a"]) == copy.alone("a")


def test_a_close_that_does_not_fit_max_tokens_is_cut_and_ends_with_length() -> None:
    copy = FakeCopy()
    copy.add(thinker("a", 3, max_tokens=5))
    copy.add(thinker("b", 0, max_tokens=2))

    copy.run()

    assert copy.token_ids["a"][3:] == CLOSE[:2]
    assert (copy.token_ids["b"], copy.finish["b"]) == (CLOSE[:2], FinishReason.LENGTH)
    assert (copy.token_ids["a"], copy.finish["a"]) == copy.alone("a")


def test_a_budget_lowered_below_what_was_thought_closes_now() -> None:
    copy = FakeCopy()
    copy.add(thinker("a", None))
    while len(copy.token_ids["a"]) < 6:
        copy.step()
    copy.send()

    copy.set_budget("a", 2)
    copy.run()

    assert copy.token_ids["a"][6:10] == CLOSE
    assert (copy.token_ids["a"], copy.finish["a"]) == copy.alone("a")


def test_a_budget_is_lowered_while_the_request_waits() -> None:
    copy = FakeCopy(max_num_seqs=1)
    copy.add(request("runs", [1]))
    copy.add(thinker("a", 9))

    copy.set_budget("a", 0)
    copy.run()

    assert copy.token_ids["a"][:4] == CLOSE


def test_a_budget_of_a_request_that_answers_or_has_ended_changes_nothing() -> None:
    copy = FakeCopy()
    copy.add(thinker("a", None, starts_thinking=False))
    copy.step()

    copy.set_budget("a", 0)
    copy.set_budget("unknown", 0)
    copy.run()

    assert (copy.token_ids["a"], copy.forced) == (copy.alone("a")[0], {})


def test_forced_tokens_have_a_logprob_of_zero() -> None:
    copy = FakeCopy()
    copy.add(thinker("a", 2, sampling=SamplingParams(seed=7, num_logprobs=1)))

    copy.run()

    assert [entry.logprob for entry in copy.logprobs["a"][2:6]] == [0.0] * 4
    assert len(copy.logprobs["a"]) == len(copy.token_ids["a"])


# Logprobs of the prompt


@pytest.mark.parametrize("chunk", [4, 16])
def test_a_scored_prompt_is_told_with_the_first_token_and_skips_the_cache(chunk: int) -> None:
    copy = FakeCopy(max_num_batched_tokens=chunk)
    copy.add(request("plain", PROMPT))
    copy.run()
    copy.add(request("asks", PROMPT, num_prompt_logprobs=2))
    copy.run()
    copy.add(request("plain again", PROMPT))
    copy.run()

    scores = copy.prompt_logprobs["asks"]
    assert [(entry.logprob, len(entry.top)) for entry in scores] == [(-float(token), 2) for token in PROMPT[1:]]
    assert (copy.cached_tokens["asks"], copy.cached_tokens["plain again"]) == (0, 8)
    assert copy.scheduler.stats.prefix_query_tokens_total == 2 * len(PROMPT)


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    copy = FakeCopy()
    copy.add(request("a", [1], num_prompt_logprobs=2))

    copy.run()

    assert (copy.prompt_logprobs, copy.token_ids["a"]) == ({}, copy.alone("a")[0])
