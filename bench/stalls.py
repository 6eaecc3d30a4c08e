"""How long running streams wait for their tokens while a long prompt is put through the model, against before it.

    python -m bench.stalls [--model DIR ...] [--streams 8] [--slowdowns none,2.5] [--out bench/results/stalls.json]

The engine with its step loop in this process, one rank, two threads. For each bound of `engine.max_prefill_slowdown`
("none": a step takes as many prompt tokens as its budget holds): so many streams run, for a while alone, then beside
a prompt of 4,096 tokens until its first token; some rounds. Gaps between a stream's tokens, of all streams together.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.report import Spread, arguments, machine, versions, write
from cluster.router.engine import Engine
from cluster.router.in_process import InProcessGroup
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import SequenceRequest, SequenceUpdate
from cluster.router.shard_group import GroupBounds
from workers.config import ModelConfig, ParallelLayout, RunnerConfig
from workers.step import SamplingParams

POCKET = Path(__file__).parents[1] / "deploy" / "models" / "pocket"
CONTEXT = 8192
SHORT_PROMPT = 32
IDLE_GAPS = 60
"""Tokens that each stream gets before the long prompt comes."""
KV_BYTES = 2 * 2**30
BUDGET = 512
"""As `mull serve` has it."""


@dataclass
class Watched:
    """When tokens came."""

    at_s: dict[Any, list[float]] = field(default_factory=dict)
    """Of each request."""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, updates: list[SequenceUpdate]) -> None:
        now_s = time.perf_counter()
        for update in updates:
            if update.token_ids:
                self.at_s.setdefault(update.key, []).append(now_s)
        self.news.set()

    async def until(self, keys: Sequence[Any], count: int) -> None:
        """Each of them has so many."""
        while not all(len(self.at_s.get(key, ())) >= count for key in keys):
            self.news.clear()
            await self.news.wait()

    def gaps_ms(self, keys: Sequence[Any], since_s: float, until_s: float) -> list[float]:
        """Between tokens, of which the later came within these times."""
        gaps = []
        for key in keys:
            at_s = self.at_s[key]
            gaps += [1e3 * (b - a) for a, b in pairwise(at_s) if since_s < b <= until_s]
        return gaps


def p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def engine_of(model_dir: Path, slowdown: float | None, threads: int, watched: Watched) -> Engine:
    """One rank in this process, with this bound."""
    config = SchedulerConfig(
        max_model_len=CONTEXT, max_num_seqs=64, max_num_batched_tokens=BUDGET, max_prefill_slowdown=slowdown
    )
    runner = RunnerConfig(
        model_dir=str(model_dir),
        rank=0,
        layout=ParallelLayout(tp=1),
        device="cpu",
        num_threads=threads,
        max_model_len=CONTEXT,
        max_num_seqs=64,
        max_num_batched_tokens=BUDGET,
        kv_memory_bytes=KV_BYTES,
    )
    return Engine(
        config,
        lambda on_progress, _: InProcessGroup(runner, GroupBounds(), on_progress),
        on_updates=watched.take,
        on_ended=print,
        enable_prefix_cache=False,
    )


async def measure(
    model_dir: Path, streams: int, slowdown: float | None, prompt_tokens: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Figures of one bound."""
    watched = Watched()
    engine = engine_of(model_dir, slowdown, threads, watched)
    engine.start()
    await engine.wait_settled()
    vocab_size = min(ModelConfig.from_dir(model_dir).vocab_size, 900)
    draw = random.Random(0)

    def request(key: Any, num_tokens: int, max_tokens: int) -> SequenceRequest:
        prompt_ids = [draw.randrange(vocab_size) for _ in range(num_tokens)]
        sampling = SamplingParams(temperature=1.0, seed=draw.randrange(2**31))
        return SequenceRequest(key=key, prompt_ids=prompt_ids, sampling=sampling, max_tokens=max_tokens)

    rows: dict[str, list[float]] = {name: [] for name in ("idle_p99_ms", "p99_ms", "p50_ms", "ttft_s", "ratio")}
    try:
        for number in range(rounds):
            keys = [(number, stream) for stream in range(streams)]
            for key in keys:
                engine.add(request(key, SHORT_PROMPT, CONTEXT - SHORT_PROMPT))
            await watched.until(keys, 5)
            idle_from_s = time.perf_counter()
            await watched.until(keys, 5 + IDLE_GAPS)
            added_s = time.perf_counter()
            engine.add(request((number, "long"), prompt_tokens, 1))
            await watched.until([(number, "long")], 1)
            first_s = watched.at_s[number, "long"][0]
            await asyncio.sleep(0)
            idle = watched.gaps_ms(keys, idle_from_s, added_s)
            busy = watched.gaps_ms(keys, added_s, first_s + 1e-3)
            for key in keys:
                engine.cancel(key)
            rows["idle_p99_ms"].append(p99(idle))
            rows["p99_ms"].append(p99(busy))
            rows["p50_ms"].append(statistics.median(busy))
            rows["ratio"].append(p99(busy) / p99(idle))
            rows["ttft_s"].append(first_s - added_s)
    finally:
        await engine.stop()
    return {name: Spread.of(values) for name, values in rows.items()}


def main() -> None:
    parser = arguments(__doc__, streams="8")
    parser.add_argument("--model", type=Path, action="append")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--slowdowns", default="none,2.5")
    parser.add_argument("--threads", type=int, default=2)
    parser.set_defaults(runs=3)
    args = parser.parse_args()
    rows = []
    for model_dir in args.model or [POCKET]:
        for streams in map(int, args.streams.split(",")):
            for text in args.slowdowns.split(","):
                slowdown = None if text == "none" else float(text)
                measuring = measure(model_dir, streams, slowdown, args.prompt, args.runs, args.threads)
                spreads = asyncio.run(measuring)
                gc.collect()  # the engine's memory, before the next one's
                rows.append({"model": model_dir.name, "streams": streams, "max_prefill_slowdown": slowdown, **spreads})
                print(
                    f"{model_dir.name} {streams} streams, slowdown {text}: p99 {spreads['p99_ms']} ms beside a prompt "
                    f"of {args.prompt}, {spreads['idle_p99_ms']} before it: {spreads['ratio']} ×; its first token "
                    f"after {spreads['ttft_s']} s",
                    flush=True,
                )
    write(args.out, {"machine": {**machine(), **versions("torch")}, "prompt_tokens": args.prompt, "rows": rows})


if __name__ == "__main__":
    main()
