"""Drives ModelRunner with plans, and records the logits of every sampled row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from tests.workers.ranks import TIMEOUT_S
from workers.config import ParallelLayout, RunnerConfig
from workers.parallel import ParallelState
from workers.runner import ModelRunner
from workers.step import OpenSlot, PlacementUpdate, Prefill, SamplingParams, StepPlan, StepResult

GREEDY = SamplingParams(temperature=0.0)
BLOCK_SIZE = 16
MAX_MODEL_LEN = 128
BLOCKS_PER_SLOT = MAX_MODEL_LEN // BLOCK_SIZE


@dataclass
class Ran:
    """What one rank answered to a list of plans."""

    results: list[StepResult] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> list[list[int]]:
        return [result.token_ids for result in self.results]


Order = StepPlan | PlacementUpdate
"""What a rank does next."""


def runner_config(directory: Path, *, tp: int = 1, rank: int = 0, **changes: Any) -> RunnerConfig:
    values: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 40, "max_num_batched_tokens": 2048}
    values |= {"block_size": BLOCK_SIZE, "num_threads": 1, "kv_memory_bytes": 32 * 2**20}
    values |= {"layout": ParallelLayout(tp=tp)} | changes
    return RunnerConfig(model_dir=str(directory), rank=rank, **values)


def load(directory: Path, **changes: Any) -> ModelRunner:
    return ModelRunner(runner_config(directory, **changes), ParallelState.single())


def run(runner: ModelRunner, orders: Sequence[Order]) -> Ran:
    """Follow orders, and keep this rank's results and logits of each plan."""
    ran, compute = Ran(), runner.decoder.logits

    def record(x_BH: Tensor) -> Tensor:
        ran.logits.append(compute(x_BH).clone())
        return ran.logits[-1].clone()

    runner.decoder.logits = record
    try:
        for order in orders:
            if isinstance(order, PlacementUpdate):
                runner.place(order)
            else:
                ran.results.append(runner.execute(order))
    finally:
        runner.decoder.logits = compute
    return ran


def run_on_rank(parallel: ParallelState, directory: Path, plans: list[StepPlan]) -> Ran:
    """Load one rank of a tensor-parallel copy and run plans on it; for RankProcesses."""
    config = runner_config(directory, tp=parallel.world_size, rank=parallel.rank)
    return run(ModelRunner(config, parallel), plans)


def run_on_layout(
    parallel: ParallelState, directory: Path, layout: ParallelLayout, orders: list[list[Order]], changes: dict[str, Any]
) -> Ran:
    """Load one rank of a copy with any layout, and follow the orders of its attention group; for RankProcesses."""
    config = runner_config(directory, rank=parallel.rank, layout=layout, **changes)
    runner = ModelRunner(config, parallel.regrouped(layout, TIMEOUT_S))
    return run(runner, orders[config.spec.dp_rank])


def in_step(plans_by_group: list[list[StepPlan]]) -> list[list[StepPlan]]:
    """The groups' plans side by side: each names all groups' tokens, and a group that has ended gets empty plans."""
    steps = list(zip_longest(*plans_by_group, fillvalue=StepPlan(step=0)))
    sizes = [[plan.num_tokens for plan in step] for step in steps]
    return [
        [replace(step[group], step=index, group_tokens=sizes[index]) for index, step in enumerate(steps)]
        for group in range(len(plans_by_group))
    ]


def blocks_of(slot: int, count: int = BLOCKS_PER_SLOT) -> list[int]:
    """A scattered, private set of blocks: ids descend, so that no test passes by luck of order."""
    return [slot * BLOCKS_PER_SLOT + index for index in reversed(range(count))]


def open_slot(slot: int, sampling: SamplingParams = GREEDY, **changes: Any) -> OpenSlot:
    values: dict[str, Any] = {"block_ids": blocks_of(slot), "num_cached": 0} | changes
    return OpenSlot(slot=slot, sampling=sampling, **values)


def whole_prompts(prompts: list[list[int]], sampling: list[SamplingParams] | None = None) -> StepPlan:
    """Open one slot per prompt and prefill it all."""
    params = sampling or [GREEDY] * len(prompts)
    return StepPlan(
        step=1,
        open=[open_slot(slot, params[slot]) for slot in range(len(prompts))],
        prefills=[Prefill(slot, 0, prompt, True) for slot, prompt in enumerate(prompts)],
    )


def decode_steps(slots: list[int], count: int) -> list[StepPlan]:
    return [StepPlan(step=2 + index, decodes=slots) for index in range(count)]


def random_prompts(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]
