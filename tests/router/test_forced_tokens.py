"""What rules and budgets do to a sequence: tokens that may not come, tokens that must, and prompts that are scored."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.router.sequence import FinishReason, SequenceRequest
from tests.router.fake_copy import PROMPT, FakeCopy, request
from workers.step import SamplingParams, TokenRules

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
