"""What drafts bring: pocket with and without speculative decoding, in turn, in one process.

    python -m bench.speculation [--streams 1,4,16] [--runs 5] [--out bench/results/speculation.json]

Two loads: `questions`, each thought through once, and `loops`, thoughts that go on and on and repeat themselves. CPU
time of the process, in lockstep: what is lost because no step is under way beside one with drafts is not in it. The
tokens of both must be equal; the bench fails where they are not.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import Spread, arguments, machine, versions, write
from cluster.offline import OfflineConfig, OfflineEngine
from cluster.router.speculation import Speculation
from cluster.text.tokenizer import read_encoder
from workers.step import SamplingParams

MODEL_DIR = Path(__file__).parents[1] / "deploy" / "models" / "pocket"
NUM_DRAFTED = 5
END = "<|im_end|>"


@dataclass(frozen=True)
class Load:
    """Prompts, and how long their answers are."""

    name: str
    prompts: list[str]
    max_tokens: int
    stops: bool


def loads(count: int) -> list[Load]:
    """Both, of so many prompts each."""
    draw = random.Random(1)
    sums = [f"What is {draw.randrange(100, 1000)} + {draw.randrange(100, 1000)}?" for _ in range(count)]
    turns = [f"<|im_start|>user\n{question}{END}\n<|im_start|>assistant\n<think>\n" for question in sums]
    return [
        Load("questions", turns, 200, stops=True),
        Load("loops", turns, 700, stops=False),
    ]


def engine(max_tokens: int) -> OfflineEngine:
    """One rank on one thread."""
    return OfflineEngine(
        OfflineConfig(
            model_dir=str(MODEL_DIR),
            num_threads=1,
            enable_prefix_cache=False,
            speculation=Speculation(max_tokens=max_tokens),
        )
    )


def measure(load: Load, streams: int, temperature: float, runs: int) -> dict[str, Any]:
    """Tokens per CPU second with drafts over those without, run by run."""
    encoder = read_encoder(MODEL_DIR / "tokenizer.json")
    prompts = [encoder.encode(prompt).ids for prompt in load.prompts[:streams]]
    stops = frozenset({encoder.token_to_id(END)}) if load.stops else frozenset()
    engines = {"plain": engine(0), "drafted": engine(NUM_DRAFTED)}
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    for run in range(runs + 1):
        outputs = {}
        for name, made in engines.items():
            start_s = time.process_time()
            sampling = SamplingParams(temperature=temperature, seed=run)
            outputs[name] = made.generate(prompts, load.max_tokens, sampling, stops)
            if run:  # the first one warms up
                speeds[name].append(sum(map(len, outputs[name])) / (time.process_time() - start_s))
        if outputs["plain"] != outputs["drafted"]:
            raise RuntimeError(f"{load.name} at {streams} streams: drafts changed tokens")
    stats = engines["drafted"].stats
    return {
        "load": load.name,
        "streams": streams,
        "temperature": temperature,
        "tokens_per_cpu_s": {name: Spread.of(values) for name, values in speeds.items()},
        "speedup": Spread.of([a / b for a, b in zip(speeds["drafted"], speeds["plain"], strict=True)]),
        "draft_tokens": stats.draft_tokens_total,
        "accepted_tokens": stats.accepted_tokens_total,
    }


def main() -> None:
    args = arguments(__doc__, streams="1,4,16").parse_args()
    about = {**machine(), **versions("torch"), "num_speculative_tokens": NUM_DRAFTED}
    rows = []
    for streams in map(int, args.streams.split(",")):
        for load in loads(streams):
            for temperature in (0.0, 0.6):
                row = measure(load, streams, temperature, args.runs)
                rows.append(row)
                accepted = row["accepted_tokens"] / max(1, row["draft_tokens"])
                print(
                    f"{load.name:9} {streams:3} streams, temperature {temperature}: {row['speedup']} x, "
                    f"{row['draft_tokens']} drafted, {accepted:.0%} accepted",
                    flush=True,
                )
    write(args.out, {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
