"""The decoder against transformers on the same dequantised weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.workers.conftest import Case
from tests.workers.engine import (
    BLOCK_SIZE,
    Ran,
    blocks_of,
    decode_steps,
    load,
    open_slot,
    random_prompts,
    run,
    run_on_rank,
    whole_prompts,
)
from tests.workers.ranks import RankProcesses
from workers.kernels.cpu.library import multiplies_bf16
from workers.kernels.cpu.panels import PanelWeight
from workers.step import Prefill, StepPlan

TOLERANCE = 1e-4
"""On fp32 logits of about ±10: both sides sum in another order."""

PROMPT = random_prompts([50], 301, seed=3)[0]


def close_all(slots: range) -> StepPlan:
    return StepPlan(step=99, close=list(slots))


def whole_prompt_then_decode() -> list[StepPlan]:
    return [whole_prompts([PROMPT]), *decode_steps([0], 3), close_all(range(1))]


def prompt_in_chunks_beside_a_decode() -> list[StepPlan]:
    other = whole_prompts([PROMPT[:7]])
    first = StepPlan(step=2, open=[open_slot(1)], prefills=[Prefill(1, 0, PROMPT[:21], False)], decodes=[0])
    second = StepPlan(step=3, prefills=[Prefill(1, 21, PROMPT[21:22], False)], decodes=[0])
    third = StepPlan(step=4, prefills=[Prefill(1, 22, PROMPT[22:], True)], decodes=[0])
    return [other, first, second, third, close_all(range(2))]


def prompt_with_a_prefix_hit() -> list[StepPlan]:
    """Slot 1 shares the two full blocks that slot 0 has written."""
    cached = 2 * BLOCK_SIZE
    shared = blocks_of(0)[:2] + blocks_of(1)[2:]
    hit = open_slot(1, block_ids=shared, num_cached=cached)
    second = StepPlan(step=2, open=[hit], prefills=[Prefill(1, cached, PROMPT[cached:], True)])
    return [whole_prompts([PROMPT]), second, close_all(range(2))]


def all_plans() -> list[StepPlan]:
    return [*whole_prompt_then_decode(), *prompt_in_chunks_beside_a_decode(), *prompt_with_a_prefix_hit()]


def largest_difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max())


def generate_alone(case: Case, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' greedy output. The explicit mask keeps it from taking prompt tokens for padding."""
    prompt_ids = torch.tensor([prompt])
    options = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = case.reference.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), **options)
    new_ids: list[int] = output[0, len(prompt) :].tolist()
    return new_ids


def check_decodes(ran: Ran, case: Case) -> None:
    tokens = list(PROMPT)
    for step in range(4):
        want = case.reference_logits(tokens)[-1]
        assert largest_difference(ran.logits[step][0], want) < TOLERANCE
        tokens.append(ran.results[step].token_ids[0])


def test_whole_prefill_and_decodes_match_transformers(case: Case) -> None:
    check_decodes(run(case.runner, whole_prompt_then_decode()), case)


@pytest.mark.skipif(not multiplies_bf16(), reason="this CPU has no products of bf16")
def test_products_in_bf16_stay_near_transformers(case: Case) -> None:
    runner = load(case.directory, products="bf16")
    panels = [weight for weight in (runner.weights or {}).values() if isinstance(weight, PanelWeight)]
    assert any(weight.products == "bf16" for weight in panels)
    rows = [PROMPT, PROMPT[:7]]
    ran = run(runner, [whole_prompts(rows), close_all(range(2))])
    for logits, prompt in zip(ran.logits[0], rows, strict=True):
        want = case.reference_logits(prompt)[-1]
        assert TOLERANCE < largest_difference(logits, want) < 0.05 * float(want.abs().max())


def test_chunked_prefill_beside_decodes_matches_transformers(case: Case) -> None:
    ran = run(case.runner, prompt_in_chunks_beside_a_decode())
    assert largest_difference(ran.logits[3][0], case.reference_logits(PROMPT)[-1]) < TOLERANCE


def test_prefill_after_a_prefix_hit_matches_transformers(case: Case) -> None:
    ran = run(case.runner, prompt_with_a_prefix_hit())
    assert largest_difference(ran.logits[1][0], case.reference_logits(PROMPT)[-1]) < TOLERANCE


def test_two_ranks_match_one_in_every_kind_of_step(case: Case, two_ranks: RankProcesses) -> None:
    alone = run(case.runner, all_plans())

    ranks: list[Ran] = two_ranks.run(run_on_rank, case.directory, all_plans())

    assert ranks[0].tokens == alone.tokens
    assert not any(ranks[1].tokens)
    for step, want in enumerate(alone.logits):
        got = torch.cat([ran.logits[step] for ran in ranks], dim=1)
        assert largest_difference(got, want) < TOLERANCE


def test_two_ranks_match_transformers(case: Case, two_ranks: RankProcesses) -> None:
    ranks: list[Ran] = two_ranks.run(run_on_rank, case.directory, whole_prompt_then_decode())
    logits = [torch.cat(parts, dim=1) for parts in zip(*(ran.logits for ran in ranks), strict=True)]
    check_decodes(Ran(ranks[0].results, logits), case)


def test_greedy_outputs_of_32_mixed_prompts_equal_transformers_one_by_one(case: Case, two_ranks: RankProcesses) -> None:
    num_tokens = 8
    prompts = random_prompts([1 + (7 * index) % 61 for index in range(32)], 301, seed=5)

    plans = [whole_prompts(prompts), *decode_steps(list(range(32)), num_tokens - 1), close_all(range(32))]

    alone = run(case.runner, plans)
    on_two: list[Ran] = two_ranks.run(run_on_rank, case.directory, plans)

    for slot, prompt in enumerate(prompts):
        want = generate_alone(case, prompt, num_tokens)
        for ran in (alone, on_two[0]):
            assert [tokens[slot] for tokens in ran.tokens[:num_tokens]] == want, f"prompt {slot}"
