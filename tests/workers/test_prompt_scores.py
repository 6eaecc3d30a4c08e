"""Logprobs of prompts against transformers: whole, in chunks beside a decode, on two ranks and in two groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workers.conftest import Case
from tests.workers.engine import decode_steps, in_step, load, open_slot, random_prompts, run, run_on_layout, run_on_rank
from tests.workers.ranks import RankProcesses
from workers.config import ParallelLayout
from workers.errors import PlanError
from workers.step import Prefill, Score, StepPlan, StepResult, TokenLogprobs

TOLERANCE = 2e-4
"""Twice that of logits of about ±10: a logprob is a difference of two."""

PROMPT, OTHER = random_prompts([150, 9], 301, seed=3)
PROMPT = PROMPT[:100]


def chunk(slot: int, start: int, end: int, *, num_logprobs: int = 3) -> Prefill:
    score = Score(PROMPT[start + 1 : end + 1], num_logprobs)
    return Prefill(slot, start, PROMPT[start:end], end == len(PROMPT), score)


def whole() -> list[StepPlan]:
    return [StepPlan(step=1, open=[open_slot(0)], prefills=[chunk(0, 0, 100)]), StepPlan(step=2, close=[0])]


def in_chunks_beside_others() -> list[StepPlan]:
    opened = [open_slot(slot) for slot in (0, 1)]
    return [
        StepPlan(step=1, open=opened, prefills=[Prefill(1, 0, OTHER, True), chunk(0, 0, 1)]),
        StepPlan(step=2, prefills=[chunk(0, 1, 40)], decodes=[1]),
        StepPlan(step=3, open=[open_slot(2)], prefills=[chunk(2, 0, 30, num_logprobs=0), chunk(0, 40, 100)]),
        *decode_steps([0, 1], 2),
        StepPlan(step=5, close=[0, 1, 2]),
    ]


def scores_of(results: list[StepResult], plans: list[StepPlan], slot: int) -> list[TokenLogprobs]:
    return [
        scored
        for plan, result in zip(plans, results, strict=True)
        for index, prefill in enumerate(plan.prefills)
        if prefill.slot == slot
        for scored in result.prompt_logprobs.get(index, [])
    ]


def assert_scores(scores: list[TokenLogprobs], case: Case, *, num_logprobs: int = 3, count: int = 99) -> None:
    want = case.reference_logits(PROMPT).log_softmax(-1)
    assert len(scores) == count
    for position, scored in enumerate(scores):
        tops = want[position].topk(num_logprobs).values.tolist()
        assert scored.logprob == pytest.approx(float(want[position, PROMPT[position + 1]]), abs=TOLERANCE)
        assert [value for _, value in scored.top] == pytest.approx(tops, abs=TOLERANCE)
        assert [float(want[position, token]) for token, _ in scored.top] == pytest.approx(tops, abs=TOLERANCE)


def test_a_whole_prompt_scores_as_transformers_does(case: Case) -> None:
    assert_scores(scores_of(run(case.runner, whole()).results, whole(), 0), case)


def test_chunks_score_as_the_whole_and_leave_what_is_sampled_alone(case: Case) -> None:
    plans = in_chunks_beside_others()
    plain = [
        StepPlan(
            step=plan.step,
            close=plan.close,
            open=plan.open,
            prefills=[Prefill(p.slot, p.start, p.token_ids, p.sample) for p in plan.prefills],
            decodes=plan.decodes,
        )
        for plan in plans
    ]

    ran = run(case.runner, plans)

    assert_scores(scores_of(ran.results, plans, 0), case)
    assert_scores(scores_of(ran.results, plans, 2), case, num_logprobs=0, count=30)
    assert ran.tokens == run(case.runner, plain).tokens


def test_two_ranks_score_as_one(case: Case, two_ranks: RankProcesses) -> None:
    plans = in_chunks_beside_others()

    first, second = two_ranks.run(run_on_rank, case.directory, plans)

    assert_scores(scores_of(first.results, plans, 0), case)
    assert not any(result.prompt_logprobs for result in second.results)


def test_a_group_scores_while_another_does_not(moe_fp8: Path, two_ranks: RankProcesses) -> None:
    asking, plain = (
        in_chunks_beside_others(),
        [StepPlan(step=1, open=[open_slot(0)], prefills=[Prefill(0, 0, OTHER, True)])],
    )
    plans = in_step([asking, [*plain, *decode_steps([0], 3)]])

    first, _ = two_ranks.run(run_on_layout, moe_fp8, ParallelLayout(tp=1, dp=2), plans, {})

    alone = scores_of(run(load(moe_fp8), asking).results, asking, 0)
    got = scores_of(first.results, plans[0], 0)
    assert [scored.logprob for scored in got] == pytest.approx([scored.logprob for scored in alone], abs=TOLERANCE)


def test_a_chunk_that_scores_more_rows_than_it_has_is_refused(moe_fp8: Path) -> None:
    prefill = Prefill(0, 0, [1, 2], True, Score([2, 3, 4], 0))
    with pytest.raises(PlanError, match="scores 3 of 2 rows"):
        load(moe_fp8).execute(StepPlan(step=1, open=[open_slot(0)], prefills=[prefill]))
