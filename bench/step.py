"""Where a step's time goes, and how far it is from the machine's limits: reading in decode, fp32 products in prefill.

    python -m bench.step [--model DIR] [--streams 1,8,32] [--out bench/results/step.json]

Scheduler and ModelRunner in this process, greedy. A decode step reads every weight once that has a row, and the KV of
each sequence; a prompt multiplies each token with the weights. The limits are measured in the same run. Layers
go by halves here, to be told apart: all in one call, as a lone rank's do, they are a little faster.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.limits import Limits
from bench.report import Spread, arguments, machine, versions, write
from cluster.router.blocks import BlockAllocator
from cluster.router.scheduler import Scheduler
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import SequenceRequest
from workers.config import ParallelLayout, RunnerConfig
from workers.experts.layer import ExpertLayer
from workers.kernels.cpu.halves import AttentionHalf, FeedForwardHalf
from workers.kernels.cpu.library import SIGNATURES, native
from workers.layers.attention import Attention
from workers.layers.mlp import DenseMLP
from workers.parallel import ParallelState
from workers.runner import ModelRunner
from workers.step import SamplingParams

PARTS = ("schedule", "layout", "embedding", "attention", "feed forward", "head", "sampling")


@dataclass
class Stopwatch:
    """Seconds by name; `timed` wraps a function so that its calls are added up."""

    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start_s
            return result

        return call

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


class Engine:
    """A scheduler and one rank, with a watch on each part of a step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.watch = Stopwatch()
        library = native()
        for name in SIGNATURES if library is not None else ():
            self._watch(library, name, "kernels")
        self.runner = ModelRunner(
            RunnerConfig(
                model_dir=str(args.model),
                rank=0,
                layout=ParallelLayout(tp=1),
                device="cpu",
                num_threads=args.threads,
                products=args.products,
                max_model_len=args.prompt + args.long + args.tokens + 2,
                max_num_seqs=64,
                max_num_batched_tokens=2048,
                block_size=args.block,
                kv_memory_bytes=args.kv_gib * 2**30,
            ),
            ParallelState.single(),
        )
        runner, decoder = self.runner, self.runner.decoder
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_model_len=runner.config.max_model_len,
                max_num_seqs=runner.config.max_num_seqs,
                max_num_batched_tokens=runner.config.max_num_batched_tokens,
            ),
            BlockAllocator(runner.num_blocks, runner.config.block_size, enable_prefix_cache=False),
        )
        decoder.stack = None
        self._watch(runner.batches, "build", "layout")
        self._watch(runner.sampler, "sample", "sampling")
        self._watch(decoder, "embedding", "embedding")
        self._watch(decoder, "logits", "head")
        self._watch(Attention, "__call__", "attention")
        self._watch(Attention, "store", "attention")
        self._watch(Attention, "attend_ends", "attention")
        self._watch(AttentionHalf, "__call__", "attention")
        self._watch(FeedForwardHalf, "__call__", "feed forward")
        self._watch(DenseMLP, "__call__", "feed forward")
        self._watch(ExpertLayer, "__call__", "feed forward")

    def _watch(self, owner: object, attribute: str, name: str) -> None:
        setattr(owner, attribute, self.watch.timed(name, getattr(owner, attribute)))

    def run(self, prompts: list[list[int]], tokens_out: int) -> tuple[list[float], list[dict[str, float]]]:
        """Seconds of each step, and of its parts."""
        runner, scheduler = self.runner, self.scheduler
        for key, prompt_ids in enumerate(prompts):
            sampling = SamplingParams(temperature=0.0)
            scheduler.add(
                SequenceRequest(
                    key=key, prompt_ids=prompt_ids, sampling=sampling, max_tokens=tokens_out, stop_token_ids=frozenset()
                )
            )
        steps, parts = [], []
        self.watch.take()
        while scheduler.has_unfinished:
            start_s = time.perf_counter()
            plan = scheduler.schedule()
            assert plan is not None, "something is unfinished and nothing is in flight"
            planned_s = time.perf_counter()
            result = runner.execute(plan)
            executed_s = time.perf_counter()
            scheduler.apply(result)
            end_s = time.perf_counter()
            steps.append(end_s - start_s)
            parts.append(self.watch.take() | {"schedule": planned_s - start_s + end_s - executed_s})
        return steps, parts


def read_bytes(runner: ModelRunner, num_seqs: int, context: int) -> float:
    """What a decode step of so many sequences must read: weights with rows, and KV. Experts are hit evenly."""
    model, weights = runner.model, runner.weights or {}
    share = 1 - (1 - model.num_experts_per_token / model.num_experts) ** num_seqs if model.num_experts else 0
    total = num_seqs * context * runner.kv_bytes / (runner.num_blocks * runner.config.block_size)
    for name, weight in weights.items():
        if name != "embed" or model.tie_word_embeddings:
            total += weight.nbytes * (share if ".experts." in name else 1)
    return total


def decode(engine: Engine, streams: int, args: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    """Shares of a decode step, its time and its reads."""
    draw = random.Random(streams)
    prompts = [[draw.randrange(256) for _ in range(args.prompt)] for _ in range(streams)]
    engine.run(prompts, 4)
    steps, parts = engine.run(prompts, args.tokens)
    steps, parts = steps[1:], parts[1:]
    step_s = statistics.median(steps)
    shares = {name: sum(part.get(name, 0.0) for part in parts) / sum(steps) for name in (*PARTS, "kernels")}
    num_bytes = read_bytes(engine.runner, streams, args.prompt + args.tokens // 2)
    result: dict[str, Any] = {
        "step_ms": Spread.of([1e3 * step for step in steps]),
        "shares": shares,
        "read_gb_s": num_bytes / step_s / 1e9,
        "of_read_limit": num_bytes / step_s / 1e9 / limits.read_gb_per_s,
        "of_gemm_limit": streams * engine.runner.threads.flops_per_token / step_s / 1e9 / limits.fp32_gflop_per_s,
    }
    named = "  ".join(f"{name} {100 * share:.1f}" for name, share in shares.items())
    print(f"{streams:3d} streams: step {result['step_ms']} ms; % of it: {named}")
    print(
        f"             reads {result['read_gb_s']:.1f} GB/s, {100 * result['of_read_limit']:.0f} % of the limit; "
        f"{100 * result['of_gemm_limit']:.0f} % of the fp32 product limit"
    )
    return result


def prefill(engine: Engine, args: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    """Time to the first token of a long prompt, against its products alone at torch's speed."""
    draw = random.Random(0)
    times: list[float] = []
    parts: list[dict[str, float]] = []
    for _ in range(args.runs):
        steps, parts = engine.run([[draw.randrange(256) for _ in range(args.long)]], 1)
        times.append(sum(steps))
    ttft = Spread.of(times)
    limit_s = args.long * _prompt_flops(engine.runner) / limits.fp32_gflop_per_s / 1e9
    shares = {name: sum(part.get(name, 0.0) for part in parts) / times[-1] for name in (*PARTS, "kernels")}
    named = "  ".join(f"{name} {100 * share:.1f}" for name, share in shares.items())
    print(f"prompt of {args.long}: {ttft} s, {ttft.median / limit_s:.2f} of the product limit; % of it: {named}")
    return {"ttft_s": ttft, "of_limit": ttft.median / limit_s, "shares": shares}


def _prompt_flops(runner: ModelRunner) -> float:
    """Products of one token of a prompt: all but the head."""
    model = runner.model
    return runner.threads.flops_per_token - 2 * model.vocab_size * model.hidden_size


def main() -> None:
    parser = arguments(__doc__, streams="1,8,32")
    parser.add_argument("--model", type=Path, default=Path("deploy/models/pocket"))
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--long", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--products", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--kv-gib", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limits = Limits.measure(args.threads)
    print(
        machine(),
        f"read {limits.read_gb_per_s:.1f} GB/s, fp32 products {limits.fp32_gflop_per_s:.0f} GFLOP/s",
        sep="\n",
    )
    engine = Engine(args)
    streams = {count: decode(engine, count, args, limits) for count in map(int, args.streams.split(","))}
    first = prefill(engine, args, limits)
    about = {"machine": machine(), "versions": versions("torch"), "limits": limits}
    write(args.out, about | {"model": args.model.name, "decode": streams, "prefill": first})


if __name__ == "__main__":
    main()
