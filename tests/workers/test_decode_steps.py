"""Padded decode steps on buffers that stay where they are, against the steps that are laid out anew each time."""

from __future__ import annotations

import random
import weakref
from pathlib import Path

import pytest
import torch

from tests.workers.engine import (
    BLOCK_SIZE,
    BLOCKS_PER_SLOT,
    GREEDY,
    decode_steps,
    load,
    open_slot,
    random_prompts,
    run,
    whole_prompts,
)
from tests.workers.tape import Tape, on_tape
from workers.decode_steps import DecodeSteps
from workers.graphs import InterruptingGroup
from workers.parallel import ParallelState
from workers.rank_group import RankGroup
from workers.runner import ModelRunner
from workers.step import Draft, ExtendSlot, Prefill, SamplingParams, StepPlan, StepResult

MAX_SEQS = 40
VOCAB = 301
DRAWN = [SamplingParams(temperature=0.0)] * 3 + [
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, seed=slot) for slot in range(3, MAX_SEQS)
]


class Life:
    """Random plans for slots that open, grow block by block, decode together or apart, and close."""

    def __init__(self, seed: int, sampling: list[SamplingParams] = DRAWN) -> None:
        self._random, self._sampling = random.Random(seed), sampling
        self._lengths: dict[int, int] = {}
        self._step = 0

    def plans(self, count: int) -> list[StepPlan]:
        return [self._plan() for _ in range(count)]

    def _plan(self) -> StepPlan:
        draw, lengths = self._random, self._lengths
        self._step += 1
        close = [slot for slot in lengths if draw.random() < 0.05 or lengths[slot] > 100]
        for slot in close:
            del lengths[slot]
        decodes = [slot for slot in lengths if draw.random() < 0.9]
        extend = [ExtendSlot(slot, [block(slot, lengths[slot])]) for slot in decodes if not lengths[slot] % BLOCK_SIZE]
        for slot in decodes:
            lengths[slot] += 1
        opened, prefills = [], []
        if not lengths or draw.random() < 0.25:
            free = [slot for slot in range(MAX_SEQS) if slot not in lengths]
            for slot in draw.sample(free, min(len(free), draw.randrange(1, 5))):
                prompt = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 30))]
                blocks = [block(slot, first) for first in range(0, len(prompt), BLOCK_SIZE)]
                opened.append(open_slot(slot, self._sampling[slot], block_ids=blocks))
                prefills.append(Prefill(slot, 0, prompt, True))
                lengths[slot] = len(prompt)
        return StepPlan(self._step, close=close, open=opened, extend=extend, prefills=prefills, decodes=decodes)


def block(slot: int, position: int) -> int:
    """Of its own blocks, from the last one down."""
    return (slot + 1) * BLOCKS_PER_SLOT - 1 - position // BLOCK_SIZE


def tokens(results: list[StepResult]) -> list[tuple[list[int], list[list[int]]]]:
    return [(result.token_ids, result.accepted_ids) for result in results]


def padded_steps(runner: ModelRunner) -> DecodeSteps:
    assert runner._decode_steps is not None
    return runner._decode_steps


@pytest.mark.parametrize("seed", range(2))
def test_padded_steps_sample_the_same_tokens_whatever_opens_and_closes(
    seed: int, moe_fp8: Path, dense_fp8: Path
) -> None:
    plans = Life(seed).plans(40)
    for directory in (moe_fp8, dense_fp8):
        assert run(load(directory, graphs="whole"), plans).tokens == run(load(directory), plans).tokens


def test_a_padded_step_gives_the_logits_of_the_rows_alone(moe_fp8: Path) -> None:
    prompts = random_prompts([3, 20, 40], VOCAB)
    plans = [whole_prompts(prompts, DRAWN[2:5]), *decode_steps([0, 1, 2], 3)]
    want, got = run(load(moe_fp8), plans), run(load(moe_fp8, graphs="whole"), plans)
    assert [len(logits) for logits in got.logits] == [3, 4, 4, 4]  # three rows take the size of four
    for plain, padded in zip(want.logits, got.logits, strict=True):
        assert torch.equal(plain, padded[:3])


def test_a_padded_row_writes_to_no_block_that_is_given_out(moe_fp8: Path) -> None:
    runner = load(moe_fp8, graphs="whole")
    run(runner, [whole_prompts(random_prompts([5, 6, 7], VOCAB))])
    before = [layer[:, : runner.num_blocks].clone() for layer in runner.kv.layers]
    run(runner, decode_steps([0, 1, 2], 1))
    for old, new in zip(before, runner.kv.layers, strict=True):
        changed = (old != new[:, : runner.num_blocks]).any(dim=-1).any(dim=0).nonzero().tolist()
        assert changed == [[slot * BLOCKS_PER_SLOT + 7, 5 + slot] for slot in range(3)]


def test_drafts_are_kept_and_taken_back_alike(dense_fp8: Path) -> None:
    prompts = random_prompts([9, 4, 30], VOCAB, seed=3)
    start = whole_prompts(prompts, [GREEDY] * 3)
    plain = run(load(dense_fp8), [start, *decode_steps([0, 1, 2], 8)])
    by_slot = [[step[slot] for step in plain.tokens] for slot in range(3)]
    wrong = [(by_slot[1][1] + 1) % VOCAB, 5]
    drafted = StepPlan(step=2, decodes=[0, 1, 2], drafts=[Draft(0, by_slot[0][1:4]), Draft(1, wrong)])
    plans = [start, drafted, *decode_steps([0, 1, 2], 4)]
    want, got = (tokens(run(load(dense_fp8, graphs=mode), plans).results) for mode in ("off", "whole"))
    assert got == want
    assert got[1][1] == [by_slot[0][2:5], []]


def test_what_a_draw_cannot_do_takes_the_long_way_and_changes_nothing(moe_fp8: Path) -> None:
    every_kind = [
        SamplingParams(temperature=0.0, num_logprobs=2),
        SamplingParams(frequency_penalty=0.5, seed=1),
        SamplingParams(top_k=0, seed=2),
        SamplingParams(top_k=64, seed=3),
        SamplingParams(seed=4),
    ]
    prompts = random_prompts([3, 4, 5, 6, 7], VOCAB)
    orders = [whole_prompts(prompts, every_kind), *decode_steps([0, 1, 2, 3, 4], 3), *decode_steps([4], 3)]
    runner = load(moe_fp8, graphs="whole")
    assert [padded_steps(runner).bucket_for(plan) for plan in decode_steps([4], 1)] != [None]
    got, want = run(runner, orders), run(load(moe_fp8), orders)
    assert got.tokens == want.tokens
    assert [padded_steps(runner).bucket_for(StepPlan(step=9, decodes=[slot, 4])) for slot in range(4)] == [None] * 4


def test_a_recorded_step_depends_on_nothing_but_its_buffers(dense_fp8: Path) -> None:
    plans = Life(7).plans(40)
    got, num_replays = on_tape(ParallelState.single(), dense_fp8, plans, "whole")
    assert got == run(load(dense_fp8), plans).tokens
    assert num_replays > 20


def test_what_goes_through_collectives_has_one_place_for_all_layers_of_a_recording() -> None:
    tape = Tape()
    group, layers = InterruptingGroup(RankGroup(0, 2, None), tape), [torch.ones(2, 4) for _ in range(3)]
    tape.is_recording = True
    received = {group.all_to_all(x, [1, 1], [1, 1]).data_ptr() for x in layers}
    held = [weakref.ref(x) for x in layers]
    layers = [torch.ones(2, 4) for _ in range(3)]
    assert [ref() for ref in held] == [None] * 3, "rows on their way hold memory of each layer"
    gathered = {group.all_gather(x).data_ptr() for x in layers}
    assert (len(gathered), len(received), len(gathered | received)) == (1, 1, 2)
    assert group.all_gather(layers[0][:1]).data_ptr() not in gathered


def test_a_step_that_looks_at_a_value_cannot_be_recorded() -> None:
    with pytest.raises(AssertionError, match="looks at a value"):
        Tape().record(lambda: print(torch.ones(3).sum().item()))
