"""One model over many layouts: does each load, what does a rank hold, and does it answer as one rank does?

    python -m bench.make_checkpoint /tmp/one-layer --model 235b --layers 1 --vocab 1024
    python -m bench.layouts --model /tmp/one-layer [--layouts "tp=8 tp=4,dp=2 dp=8"] [--out bench/results/layouts.json]

Every rank is a process with one thread, joined over gloo. The same prompts are prefilled in one step and decoded
greedily in a few; logits are compared with those of one rank. Times say little where ranks outnumber cores.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.processes import on_ranks
from bench.report import machine, versions, write
from workers.config import ModelConfig, ParallelLayout, RunnerConfig
from workers.parallel import ParallelState
from workers.runner import ModelRunner
from workers.step import OpenSlot, Prefill, SamplingParams, StepPlan

BLOCK_SIZE = 32
NUM_DECODES = 4
MODEL_LEN = 256


@dataclass(frozen=True)
class Ran:
    """What one rank tells of itself."""

    load_s: float
    weight_bytes: int
    heads: int
    kv_heads: int
    experts: int
    step_s: list[float]
    tokens: list[list[int]]
    logits: list[npt.NDArray[np.float32]]
    """This rank's part of the vocabulary, for each step."""


def group_plans(prompts: list[list[int]], layout: ParallelLayout) -> list[list[StepPlan]]:
    """Each group takes neighbouring prompts: prefill all, then decode all."""
    bounds = [len(prompts) * group // layout.dp for group in range(layout.dp + 1)]
    parts = [prompts[start:stop] for start, stop in pairwise(bounds)]
    steps = [[_prefill(part) for part in parts]]
    steps += [[StepPlan(step=2 + n, decodes=list(range(len(part)))) for part in parts] for n in range(NUM_DECODES)]
    sizes = [[plan.num_tokens for plan in step] for step in steps]
    return [
        [msgspec.structs.replace(step[group], group_tokens=size) for step, size in zip(steps, sizes, strict=True)]
        for group in range(layout.dp)
    ]


def _prefill(prompts: list[list[int]]) -> StepPlan:
    per_slot = MODEL_LEN // BLOCK_SIZE
    blocks = [list(range(slot * per_slot, (slot + 1) * per_slot)) for slot in range(len(prompts))]
    greedy = SamplingParams(temperature=0.0)
    return StepPlan(
        step=1,
        open=[OpenSlot(slot, blocks[slot], 0, greedy) for slot in range(len(prompts))],
        prefills=[Prefill(slot, 0, prompt, True) for slot, prompt in enumerate(prompts)],
    )


def serve(parallel: ParallelState, config: RunnerConfig, plans: list[StepPlan]) -> Ran:
    """One rank's job."""
    start = time.perf_counter()
    runner = ModelRunner(config, parallel)
    load_s = time.perf_counter() - start
    logits: list[npt.NDArray[np.float32]] = []
    compute = runner.decoder.logits

    def record(x_BH: Tensor) -> Tensor:
        logits_Bv = compute(x_BH)
        logits.append(logits_Bv.numpy().copy())
        return logits_Bv

    runner.decoder.logits = record
    results = [runner.execute(plan) for plan in plans]
    spec, model = config.spec, runner.model
    return Ran(
        load_s=load_s,
        weight_bytes=runner.weight_bytes,
        heads=spec.heads(model).size,
        kv_heads=spec.kv_heads(model).size,
        experts=len(spec.experts(model)),
        step_s=[result.compute_s for result in results],
        tokens=[result.token_ids for result in results],
        logits=logits,
    )


def run_layout(model: Path, layout: ParallelLayout, prompts: list[list[int]]) -> list[Ran]:
    """Start the ranks of one copy, and wait for what they tell."""
    config = RunnerConfig(
        model_dir=str(model),
        layout=layout,
        num_threads=1,
        max_model_len=MODEL_LEN,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=len(prompts) * MODEL_LEN,
        block_size=BLOCK_SIZE,
        kv_memory_bytes=2**28,
    )
    plans = group_plans(prompts, layout)
    ranks = [replace(config, rank=rank) for rank in range(layout.world_size)]
    return on_ranks(layout, serve, [(rank, plans[rank.spec.dp_rank]) for rank in ranks])


def joined(ranks: list[Ran], layout: ParallelLayout) -> tuple[list[list[int]], list[Tensor]]:
    """Tokens and whole logits of each step, of all groups one after another."""
    starts = range(0, layout.world_size, layout.tp)
    steps = range(1 + NUM_DECODES)
    tokens = [[token for start in starts for token in ranks[start].tokens[step]] for step in steps]

    def whole(group: list[Ran], step: int) -> Tensor:
        return torch.cat([torch.from_numpy(ran.logits[step]) for ran in group], dim=1)

    return tokens, [torch.cat([whole(ranks[start : start + layout.tp], step) for start in starts]) for step in steps]


def measure(model: Path, layouts: list[ParallelLayout], prompts: list[list[int]]) -> list[dict[str, Any]]:
    alone = run_layout(model, ParallelLayout(), prompts)
    want_tokens, want_logits = joined(alone, ParallelLayout())
    rows = [_row(ParallelLayout(), alone)]
    for layout in layouts:
        ranks = run_layout(model, layout, prompts)
        tokens, logits = joined(ranks, layout)
        error = max(_error(got, want) for got, want in zip(logits, want_logits, strict=True))
        rows.append(_row(layout, ranks) | {"same_tokens": tokens == want_tokens, "largest_relative_error": error})
    return rows


def _error(got: Tensor, want: Tensor) -> float:
    """Relative to the largest logit."""
    return float((got - want).abs().max() / want.abs().max())


def _row(layout: ParallelLayout, ranks: list[Ran]) -> dict[str, Any]:
    slowest = max(ranks, key=lambda ran: sum(ran.step_s))
    return {
        "layout": asdict(layout),
        "name": str(layout),
        "heads": ranks[0].heads,
        "kv_heads": ranks[0].kv_heads,
        "experts": sorted({ran.experts for ran in ranks}),
        "weight_bytes": [ran.weight_bytes for ran in ranks],
        "load_s": max(ran.load_s for ran in ranks),
        "prefill_s": slowest.step_s[0],
        "decode_s": slowest.step_s[1:],
    }


def print_report(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        sizes = [size / 1e9 for size in row["weight_bytes"]]
        print(
            f"{row['name']:16s} {row['heads']} heads, {row['kv_heads']} KV heads, {row['experts']} experts, "
            f"{min(sizes):.2f}…{max(sizes):.2f} GB a rank, {sum(sizes):.2f} in all; load {row['load_s']:.1f} s; "
            f"prefill {row['prefill_s']:.2f} s, decode {1e3 * min(row['decode_s']):.0f} ms"
        )
        if "same_tokens" in row:
            same = "the same tokens as one rank" if row["same_tokens"] else "OTHER TOKENS than one rank"
            print(f"{'':16s} {same}; logits off by at most {row['largest_relative_error']:.1e} of the largest")


def parse_layout(text: str) -> ParallelLayout:
    """tp=4,dp=2"""
    return ParallelLayout(**{name: int(size) for name, size in (part.split("=") for part in text.split(","))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--layouts", default="tp=8 tp=4,dp=2 dp=8")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=75, help="tokens of each prompt")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    layouts = [parse_layout(text) for text in args.layouts.split()]
    config = ModelConfig.from_dir(args.model)
    for layout in layouts:
        layout.check(config)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, config.vocab_size, (args.prompts, args.prompt), generator=generator).tolist()
    rows = measure(args.model, layouts, prompts)
    print_report(rows)
    shown = {"model": args.model.name, "layers": config.num_layers, "prompts": [args.prompts, args.prompt]}
    write(args.out, shown | {"machine": machine(), "versions": versions("torch"), "layouts": rows})


if __name__ == "__main__":
    main()
