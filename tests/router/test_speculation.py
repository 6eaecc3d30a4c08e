"""Drafts: what is guessed, when it is worth its rows, and that no token is another one for it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import EngineError
from cluster.router.assembly import row_cost
from cluster.router.drafter import MAX_SUFFIXES, SUFFIX, Drafter
from cluster.router.sequence import FinishReason
from cluster.router.speculation import Speculation
from tests.real_models import QWEN3_4B, QWEN3_235B
from tests.router.fake_copy import FakeCopy, request
from tests.router.fake_groups import FakeGroups
from workers.config import Device, ModelConfig
from workers.step import SamplingParams, StepResult

SURE = 0.01
"""A chance that every draft has."""
REPETITIVE: dict[str, Any] = {"vocab_size": 8, "reach": 1, "num_speculative_tokens": 4, "num_blocks": 64}


def drafter_of(*token_ids: int) -> Drafter:
    return Drafter(token_ids)


def test_what_followed_the_last_tokens_before_is_what_is_expected_again() -> None:
    assert drafter_of(1, 2, 3, 4, 5, 1, 2, 3).draft(2, SURE) == [4, 5]


def test_the_latest_of_several_places_counts() -> None:
    assert drafter_of(1, 2, 3, 4, 1, 2, 3, 9, 1, 2, 3).draft(1, SURE) == [9]


def test_a_text_that_repeats_itself_is_expected_to_go_on_so() -> None:
    assert drafter_of(7, 7, 7, 7).draft(5, SURE) == [7] * 5
    assert drafter_of(1, 2, 1, 2, 1, 2).draft(5, SURE) == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("known", [(), (1,), (1, 2, 3), (1, 2, 3, 4, 5, 6)])
def test_what_has_not_come_before_is_not_guessed(known: tuple[int, ...]) -> None:
    assert drafter_of(*known).draft(4, SURE) == []


def test_doubtful_drafts_are_short_and_then_none() -> None:
    drafter = drafter_of(*range(9), *range(3))
    lengths = [len(drafter.draft(6, chance)) for chance in (0.6, 0.4, 0.2, 0.05)]
    assert lengths == [0, 1, 2, 4]


def test_every_token_tells_how_good_the_guesses_are_even_those_that_were_not_made() -> None:
    regular, erratic = drafter_of(*[1, 2, 3, 4] * 3), drafter_of(*[1, 2, 3, 4] * 3)
    for token_id in [1, 2, 3, 4] * 10:
        regular.push(token_id)
    for token_id in [1, 1, 3, 3, 2, 4] * 10:
        erratic.push(token_id)

    assert regular.hit_rate > 0.95
    assert regular.draft(8, 0.6)
    assert erratic.hit_rate != pytest.approx(regular.hit_rate)


def test_what_it_keeps_is_bounded() -> None:
    drafter = Drafter(range(MAX_SUFFIXES + 100))
    oldest, newest = list(range(SUFFIX)), list(range(MAX_SUFFIXES, MAX_SUFFIXES + SUFFIX))
    drafter.extend(oldest)
    assert drafter.draft(1, SURE) == []
    drafter.extend(newest)
    assert drafter.draft(1, SURE) == [newest[-1] + 1]


def test_accepted_drafts_save_steps_and_change_no_token() -> None:
    copy = FakeCopy(**REPETITIVE)
    copy.add(request(0, [3, 1, 4], max_tokens=100))
    copy.run()

    stats = copy.scheduler.stats
    assert (copy.token_ids[0], copy.finish[0]) == copy.alone(0)
    assert stats.accepted_tokens_total > 50
    assert stats.accepted_tokens_total <= stats.draft_tokens_total
    assert len(copy.plans) < 50
    assert (
        sum(plan.num_tokens for plan in copy.plans) == 3 + 99 + stats.draft_tokens_total - stats.accepted_tokens_total
    )


def test_no_other_step_is_under_way_beside_one_with_drafts() -> None:
    copy = FakeCopy(**REPETITIVE, max_in_flight=3)
    copy.add(request(0, [3, 1, 4], max_tokens=100))
    while not (copy.plans and copy.plans[-1].drafts):
        if copy.send() is None:
            copy.receive()

    assert copy.send() is None
    assert len(copy.in_flight) == 1


@pytest.mark.parametrize(
    "asked",
    [
        {"sampling": SamplingParams(seed=7, num_logprobs=1)},
        {"sampling": SamplingParams(seed=7, repetition_penalty=1.5)},
        {"bad_words": [[2]]},
        {"min_tokens": 5},
    ],
)
def test_where_ranks_would_have_to_take_something_back_nothing_is_drafted(asked: dict[str, Any]) -> None:
    copy = FakeCopy(**REPETITIVE)
    copy.add(request(0, [3, 1, 4], max_tokens=60, **asked))
    copy.run()

    assert copy.scheduler.stats.draft_tokens_total == 0


def test_where_rows_cost_as_much_as_steps_nothing_is_drafted() -> None:
    copy = FakeCopy(**REPETITIVE, row_cost=1.0)
    copy.add(request(0, [3, 1, 4], max_tokens=60))
    copy.run()

    assert copy.scheduler.stats.draft_tokens_total == 0


def test_an_end_among_accepted_tokens_is_the_end() -> None:
    copy = FakeCopy(**REPETITIVE)
    # given: a prompt with the whole of what comes, so that it is drafted from the start
    copy.add(request(0, [3, 1, 4], max_tokens=12))
    copy.run()
    text = [3, 1, 4, *copy.token_ids[0]]
    ending = copy.token_ids[0][-1]

    copy.add(request(1, [*text, 3, 1, 4], max_tokens=40, stop_token_ids=frozenset({ending})))
    copy.run()

    assert copy.scheduler.stats.accepted_tokens_total > 0
    assert copy.token_ids[1] == copy.token_ids[0][: copy.token_ids[0].index(ending) + 1]
    assert copy.finish[1] is FinishReason.STOP


def test_ranks_that_tell_of_other_drafts_than_they_were_given_are_refused() -> None:
    copy = FakeCopy(**REPETITIVE)
    copy.add(request(0, [3, 1, 4]))
    plan = copy.scheduler.schedule()
    assert plan is not None

    with pytest.raises(EngineError, match="told of 1 drafts"):
        copy.scheduler.apply(StepResult(plan.step, 0, [1], [[2]]))


@settings(max_examples=200)
@given(
    prompts=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=12), min_size=1, max_size=5),
    max_tokens=st.integers(1, 60),
    thinking_budget=st.none() | st.integers(0, 30),
    stops=st.sampled_from([frozenset(), frozenset({0})]),
    reach=st.integers(1, 3),
    most=st.integers(1, 8),
    num_blocks=st.integers(6, 40),
    budget=st.integers(5, 30),
)
def test_with_drafts_everyone_gets_what_they_get_without(
    prompts: list[list[int]],
    max_tokens: int,
    thinking_budget: int | None,
    stops: frozenset[int],
    reach: int,
    most: int,
    num_blocks: int,
    budget: int,
) -> None:
    copy = FakeCopy(
        vocab_size=6,
        reach=reach,
        num_speculative_tokens=most,
        num_blocks=num_blocks,
        max_num_seqs=5,
        max_num_batched_tokens=budget,
    )
    for key, prompt_ids in enumerate(prompts):
        thinking = {"starts_thinking": True, "think_end_id": 1, "close_thinking_ids": [5, 1], "stop_token_ids": stops}
        copy.add(request(key, prompt_ids, max_tokens=max_tokens, thinking_budget=thinking_budget, **thinking))

    copy.run()

    for key in copy.requests:
        assert (copy.token_ids[key], copy.finish[key]) == copy.alone(key)
    assert copy.blocks.num_free == copy.blocks.num_blocks


def test_a_prompt_that_is_under_way_keeps_two_steps_under_way() -> None:
    """Its last tokens have come before, but it cannot be drafted yet."""
    copy = FakeCopy(**REPETITIVE, max_num_batched_tokens=8)
    copy.add(request(0, [1, 2, 3, 4] * 10, max_tokens=4))

    copy.send()
    copy.send()

    assert len(copy.in_flight) == 2


def test_drafts_take_only_what_prompts_leave_of_a_step() -> None:
    copy = FakeCopy(**REPETITIVE, max_num_batched_tokens=6)
    copy.add(request(0, [3, 1, 4], max_tokens=100))
    while not copy.scheduler.stats.accepted_tokens_total:
        copy.step()
    before = len(copy.plans)

    copy.add(request(1, list(range(7)) * 5, max_tokens=1))
    while 1 not in copy.finish:
        copy.step()

    assert len(copy.plans) - before == 35 // 5


def test_a_group_that_drafts_keeps_step_with_one_that_does_not() -> None:
    copy = FakeGroups(2, vocab_size=8, reach=1, num_speculative_tokens=4, num_blocks=64)
    copy.add(request(0, [3, 1, 4], max_tokens=100))
    copy.add(request(1, [3, 1, 4], max_tokens=100, sampling=SamplingParams(seed=7, num_logprobs=1)))
    copy.run()

    for key in (0, 1):
        assert (copy.token_ids[key], copy.finish[key]) == copy.alone(key)
    assert copy.scheduler.stats.accepted_tokens_total > 50
    assert len(copy.steps) < 110, "one of them stood still while the other stepped"


@pytest.mark.parametrize(("row_cost", "num_running", "chance"), [(0.5, 1, 0.5), (0.5, 4, 0.8), (0.05, 1, 0.05)])
def test_a_draft_must_be_likelier_the_more_a_row_costs_and_the_more_run(
    row_cost: float, num_running: int, chance: float
) -> None:
    assert Speculation(row_cost=row_cost).least_chance(num_running) == pytest.approx(chance)


@pytest.mark.parametrize(
    ("model", "device", "lowest", "highest"),
    [(QWEN3_4B, "cuda", 0.04, 0.06), (QWEN3_235B, "cuda", 0.5, 0.75), (QWEN3_4B, "cpu", 0.6, 0.6)],
    ids=["dense", "mixture of experts", "cpu"],
)
def test_a_row_costs_more_where_it_reads_experts_of_its_own(
    model: ModelConfig, device: Device, lowest: float, highest: float
) -> None:
    assert lowest <= row_cost(model, device) <= highest
