"""Drafts on real ranks: tokens are those of plain decodes, bit for bit, however right or wrong the guesses are."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.workers.engine import GREEDY, Ran, decode_steps, load, open_slot, random_prompts, run, run_on_rank
from tests.workers.ranks import RankProcesses
from workers.errors import PlanError
from workers.step import Draft, Prefill, SamplingParams, StepPlan, TokenRules

NUM_TOKENS = 24
PROMPTS = random_prompts([5, 30, 17], 300, seed=4)
SAMPLING = [GREEDY, SamplingParams(temperature=0.9, seed=3), SamplingParams(temperature=0.7, top_k=5, seed=9)]
SLOTS = list(range(len(PROMPTS)))


def first_plan() -> StepPlan:
    return StepPlan(
        step=1,
        open=[open_slot(slot, sampling) for slot, sampling in enumerate(SAMPLING)],
        prefills=[Prefill(slot, 0, prompt, True) for slot, prompt in enumerate(PROMPTS)],
    )


def plain_plans() -> list[StepPlan]:
    return [first_plan(), *decode_steps(SLOTS, NUM_TOKENS - 1)]


def by_slot(ran: Ran) -> list[list[int]]:
    return [[tokens[slot] for tokens in ran.tokens] for slot in SLOTS]


def drafting_plans(expected: list[list[int]], draw: random.Random) -> list[StepPlan]:
    """Plans with drafts of random lengths, right up to a random token, until each slot has all that is expected."""
    plans, num_known = [first_plan()], [1] * len(SLOTS)
    while any(known < NUM_TOKENS for known in num_known):
        decodes = [slot for slot in SLOTS if num_known[slot] < NUM_TOKENS]
        drafts = []
        for slot in decodes:
            coming = expected[slot][num_known[slot] : NUM_TOKENS - 1]
            guesses = coming[: draw.randrange(6)]
            num_right = draw.randrange(len(guesses) + 1)
            guesses[num_right:] = [(token + 1) % 300 for token in guesses[num_right:]]
            if guesses:
                drafts.append(Draft(slot, guesses))
            num_known[slot] += 1 + num_right
        plans.append(StepPlan(step=len(plans) + 1, decodes=decodes, drafts=drafts))
    return plans


def drafted_tokens(ran: Ran, plans: list[StepPlan]) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in SLOTS]
    for plan, result in zip(plans, ran.results, strict=True):
        for slot, token in zip(plan.sampling_slots, result.token_ids, strict=True):
            tokens[slot].append(token)
        for draft, accepted in zip(plan.drafts, result.accepted_ids, strict=True):
            tokens[draft.slot] += accepted
    return tokens


@pytest.mark.parametrize("seed", range(4))
def test_right_and_wrong_drafts_leave_the_tokens_as_they_are(moe_fp8: Path, seed: int) -> None:
    expected = by_slot(run(load(moe_fp8), plain_plans()))
    plans = drafting_plans(expected, random.Random(seed))

    ran = run(load(moe_fp8), plans)

    assert drafted_tokens(ran, plans) == expected
    assert any(result.accepted_ids for result in ran.results)


def test_the_logits_behind_a_draft_have_the_bits_of_a_plain_decode(moe_fp8: Path) -> None:
    plain = run(load(moe_fp8), plain_plans())
    coming = by_slot(plain)[1]
    first = StepPlan(step=1, open=[open_slot(1, SAMPLING[1])], prefills=[Prefill(1, 0, PROMPTS[1], True)])

    ran = run(load(moe_fp8), [first, StepPlan(step=2, decodes=[1], drafts=[Draft(1, coming[1:6])])])

    assert ran.results[1].accepted_ids == [coming[2:7]]
    assert torch.equal(ran.logits[1], torch.stack([plain.logits[step][1] for step in range(1, 7)]))


def test_a_draft_beside_a_prompt_in_the_same_step(moe_fp8: Path) -> None:
    expected = by_slot(run(load(moe_fp8), plain_plans()))
    first = StepPlan(step=1, open=[open_slot(0, SAMPLING[0])], prefills=[Prefill(0, 0, PROMPTS[0], True)])
    both = StepPlan(
        step=2,
        open=[open_slot(1, SAMPLING[1])],
        prefills=[Prefill(1, 0, PROMPTS[1], True)],
        decodes=[0],
        drafts=[Draft(0, [*expected[0][1:3], 299])],
    )

    ran = run(load(moe_fp8), [first, both, *decode_steps([0, 1], 2)])

    assert ran.results[1].token_ids == [expected[1][0], expected[0][1]]
    assert ran.results[1].accepted_ids == [expected[0][2:4]]
    assert ran.tokens[2:] == [[expected[0][4], expected[1][1]], [expected[0][5], expected[1][2]]]


def test_two_tensor_parallel_ranks_accept_what_one_does(two_ranks: RankProcesses, moe_fp8: Path) -> None:
    expected = by_slot(run(load(moe_fp8), plain_plans()))
    plans = drafting_plans(expected, random.Random(7))

    first, second = two_ranks.run(run_on_rank, moe_fp8, plans)

    assert drafted_tokens(first, plans) == expected
    assert not any(result.accepted_ids for result in second.results)


@pytest.mark.parametrize(
    ("opened", "draft", "words"),
    [
        ({}, Draft(0, []), "no tokens"),
        ({}, Draft(1, [3]), "it decodes"),
        ({}, Draft(0, [300_000]), "the vocabulary has"),
        ({}, Draft(0, [3] * 200), "blocks hold"),
        ({"sampling": SamplingParams(num_logprobs=1)}, Draft(0, [3]), "drafts cannot have"),
        ({"sampling": SamplingParams(presence_penalty=1)}, Draft(0, [3]), "drafts cannot have"),
        ({"rules": TokenRules(bad_words=[[4]])}, Draft(0, [3]), "drafts cannot have"),
    ],
)
def test_a_draft_that_cannot_be_is_refused(moe_fp8: Path, opened: dict[str, object], draft: Draft, words: str) -> None:
    runner = load(moe_fp8)
    runner.execute(StepPlan(step=1, open=[open_slot(0, **opened)], prefills=[Prefill(0, 0, [1, 2, 3], True)]))

    with pytest.raises(PlanError, match=words):
        runner.execute(StepPlan(step=2, decodes=[0], drafts=[draft]))
