"""Deterministic ranks: the same tokens before give the same bits, in any batch and however they were computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.workers.engine import GREEDY, Ran, decode_steps, load, open_slot, random_prompts, run, run_on_layout
from tests.workers.ranks import RankProcesses
from workers.config import ParallelLayout
from workers.errors import LayoutError
from workers.kernels.cpu.library import CHOICE_VARIABLE, multiplies_bf16, native
from workers.runner import ModelRunner
from workers.step import Prefill, SamplingParams, StepPlan

VOCAB = 301
PROMPT = random_prompts([37], VOCAB, seed=9)[0]
OTHERS = random_prompts([3, 50, 8, 17, 1, 29], VOCAB, seed=10)
SAMPLING = SamplingParams(temperature=0.9, seed=5)
NUM_TOKENS = 12


def chunks_of(sizes: Sequence[int], slot: int, token_ids: list[int]) -> list[Prefill]:
    """The last of them samples."""
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        Prefill(slot, start, token_ids[start : start + size], start + size == len(token_ids))
        for start, size in zip(starts, sizes, strict=True)
    ]


def alone() -> list[StepPlan]:
    (prefill,) = chunks_of([len(PROMPT)], 0, PROMPT)
    return [StepPlan(step=1, open=[open_slot(0, SAMPLING)], prefills=[prefill]), *decode_steps([0], NUM_TOKENS - 1)]


def crowded(slot: int, cuts: Sequence[int]) -> list[StepPlan]:
    """In chunks beside other prompts, then beside their decodes; every other step some of them have a pause."""
    plans = []
    for step, chunk in enumerate(chunks_of(cuts, slot, PROMPT)):
        opened = [open_slot(slot, SAMPLING)] if step == 0 else []
        other = 2 * step + (slot == 0)
        opened.append(open_slot(other, GREEDY))
        prompt = OTHERS[step % len(OTHERS)]
        plans.append(StepPlan(step, open=opened, prefills=[chunk, Prefill(other, 0, prompt, True)]))
    others = [2 * step + (slot == 0) for step in range(len(cuts))]
    for step in range(NUM_TOKENS - 1):
        beside = others if step % 2 else others[:1]
        plans.append(StepPlan(step, decodes=[*beside, slot]))
    return plans


def replayed(tokens: list[int]) -> list[StepPlan]:
    """After a preemption: what was sampled comes as part of the prompt."""
    known = PROMPT + tokens[:-1]
    (prefill,) = chunks_of([len(known)], 3, known)
    return [StepPlan(step=1, open=[open_slot(3, SAMPLING)], prefills=[prefill])]


def own_logits(ran: Ran, plans: list[StepPlan], slot: int) -> list[Tensor]:
    """Of the rows that sampled for a slot."""
    found = []
    steps = iter(ran.logits)
    for plan in plans:
        if not plan.sampling_slots:
            continue
        logits = next(steps)
        if slot in plan.sampling_slots:
            found.append(logits[plan.sampling_slots.index(slot)])
    return found


def kv_of(runner: ModelRunner, slot: int, count: int) -> list[Tensor]:
    """All of what its first tokens have left, [X, count, D] of each layer."""
    table = runner.slots.blocks[slot]
    size = runner.slots.block_size
    cells = [int(table[position // size]) * size + position % size for position in range(count)]
    return [layer.flatten(1, 2)[:, cells].float() for layer in runner.kv.layers]


def check_bits(directory: Path, **changes: str) -> None:
    first = load(directory, deterministic=True, **changes)
    plans = alone()
    ran = run(first, plans)
    want, want_kv = own_logits(ran, plans, 0), kv_of(first, 0, len(PROMPT) + NUM_TOKENS - 1)
    tokens = [step[0] for step in ran.tokens]
    for slot, cuts in ((5, [20, 1, 16]), (0, [9, 9, 9, 10])):
        runner, plans = load(directory, deterministic=True, **changes), crowded(slot, cuts)
        got = own_logits(run(runner, plans), plans, slot)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        kv = kv_of(runner, slot, len(PROMPT) + NUM_TOKENS - 1)
        assert all(torch.equal(a, b) for a, b in zip(kv, want_kv, strict=True))
    runner, plans = load(directory, deterministic=True, **changes), replayed(tokens)
    (last,) = own_logits(run(runner, plans), plans, 3)
    assert torch.equal(last, want[-1])
    kv = kv_of(runner, 3, len(PROMPT) + NUM_TOKENS - 1)
    assert all(torch.equal(a, b) for a, b in zip(kv, want_kv, strict=True))


@pytest.mark.parametrize("graphs", ["off", "whole"])
def test_a_cpu_gives_the_same_bits_at_any_load_and_after_a_preemption(
    graphs: str, moe_fp8: Path, dense_fp8: Path
) -> None:
    check_bits(moe_fp8, graphs=graphs)
    check_bits(dense_fp8, graphs=graphs)


@pytest.mark.skipif(not multiplies_bf16(), reason="this CPU multiplies no bf16")
def test_products_and_kv_in_bf16_give_the_same_bits_at_any_load(moe_fp8: Path) -> None:
    check_bits(moe_fp8, products="bf16", kv_dtype="bf16")


def test_what_is_known_attends_otherwise_than_what_was_sampled_unless_it_is_asked_for(dense_fp8: Path) -> None:
    plans = alone()
    tokens = [step[0] for step in run(load(dense_fp8), plans).tokens]
    sampled, known = load(dense_fp8), load(dense_fp8)
    run(sampled, plans)
    run(known, replayed(tokens))
    count = len(PROMPT) + NUM_TOKENS - 1
    pairs = zip(kv_of(sampled, 0, count), kv_of(known, 3, count), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_two_ranks_give_the_same_bits_at_any_load(two_ranks: RankProcesses, moe_fp8: Path) -> None:
    changes = {"deterministic": True}
    quiet, busy = alone(), crowded(5, [20, 1, 16])
    layout = ParallelLayout(tp=2)
    ranks = [two_ranks.run(run_on_layout, moe_fp8, layout, [plans], changes) for plans in (quiet, busy)]
    for rank in range(2):
        want, got = own_logits(ranks[0][rank], quiet, 0), own_logits(ranks[1][rank], busy, 5)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_torch_alone_cannot_promise_it(dense_fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE_VARIABLE, "torch")
    native.cache_clear()
    try:
        with pytest.raises(LayoutError, match="deterministic needs mull's own kernels"):
            load(dense_fp8, deterministic=True)
    finally:
        monkeypatch.undo()
        native.cache_clear()


def test_fp8_kv_is_refused_on_a_cpu(dense_fp8: Path) -> None:
    with pytest.raises(LayoutError, match="kv_dtype fp8 needs the GPU kernels"):
        load(dense_fp8, kv_dtype="fp8")


def test_a_replica_that_a_row_chooses_is_refused(moe_fp8: Path) -> None:
    with pytest.raises(LayoutError, match="no redundant experts, and there are 2"):
        load(moe_fp8, deterministic=True, redundant_experts=2)
