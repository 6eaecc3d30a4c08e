"""How well the planner foretells: live runs on this machine, half of them to calibrate by, and published runs.

    python -m bench.plan_validation --live [--model DIR] [--out FILE]     runs that `mull plan --calibrate` reads
    python -m bench.plan_validation [--measured FILE…] [--out bench/results/plan_validation.json]

Live runs are of the engine in process: greedy, random prompts, fixed output. The costs are fitted to every other load,
and tokens/s and the time of a token of the others are foretold. Published runs are in bench/plan_published.py.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.plan_published import published_table
from bench.report import machine, versions, write
from cluster.planner.calibration import Measured, Run, fit_costs, predict, read_measured
from workers.config import ModelConfig

POCKET = Path(__file__).parents[1] / "deploy" / "models" / "pocket"
OUTPUT = 32
BOUND = 0.15
LEAST_S = 0.3
"""Of each load in each round: one of a few milliseconds is run again and again, or chance decides its figures."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", action="store_true", help="run the engine here, and write what was measured")
    parser.add_argument("--model", type=Path, default=POCKET)
    parser.add_argument("--streams", default="1,2,4,8,16,32")
    parser.add_argument("--prompts", default="32,128,512")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="with 1, CPU time is what counts: for a busy machine")
    parser.add_argument("--measured", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.live:
        write(args.out, live(args))
        return
    results: dict[str, Any] = {"live": [], "published": published_table()}
    for file in args.measured:
        results["live"].append(foretold(file))
    write(args.out, results)


def live(args: argparse.Namespace) -> dict[str, Any]:
    """Medians of rounds in which the loads take turns; with one thread, the least of its CPU times."""
    from bench.plan_engine import TimedEngine

    streams, prompts = [[int(one) for one in text.split(",")] for text in (args.streams, args.prompts)]
    engine = TimedEngine(args.model, args.threads, max_streams=max(streams), max_tokens=max(prompts) + OUTPUT + 1)
    loads = [(count, prompt) for prompt in prompts for count in streams]
    samples: dict[tuple[int, int], list[Run]] = {load: [] for load in loads}
    draw = random.Random(0)
    for round_number in range(args.runs + 1):
        for count, prompt in loads:
            left_s = LEAST_S
            while left_s > 0:
                ids = [[draw.randrange(engine.vocab_size) for _ in range(prompt)] for _ in range(count)]
                run = engine.run(ids, OUTPUT)
                left_s -= run.seconds
                if round_number:
                    samples[count, prompt].append(run)
    settle = min if args.threads == 1 else statistics.median
    runs = [_settled(samples[load], settle) for load in loads]
    for run in runs:
        print(f"{run.streams:3d} × {run.prompt:4d}: {run.tokens_per_s:8.1f} tokens/s, token {run.tpot_s * 1e3:7.2f} ms")
    return {
        "model": str(args.model),
        "machine": machine(),
        "versions": versions("torch"),
        "threads": args.threads,
        "engine": asdict(engine.setting),
        "runs": [asdict(run) for run in runs],
    }


def _settled(runs: Sequence[Run], settle: Callable[[Iterable[float]], float]) -> Run:
    """Of CPU times the least: others on the machine only add to them."""
    first = runs[0]
    return Run(
        streams=first.streams,
        prompt=first.prompt,
        output=first.output,
        seconds=settle(run.seconds for run in runs),
        ttft_s=settle(run.ttft_s for run in runs),
        tpot_s=settle(run.tpot_s for run in runs),
    )


def foretold(file: Path) -> dict[str, Any]:
    """Fits to every other load, in the order of the file, and foretells the rest."""
    measured = read_measured(file)
    model = ModelConfig.from_dir(measured.model)
    seen, unseen = halves(measured)
    start_s = time.perf_counter()
    costs = fit_costs(model, measured.engine, seen)
    rows: list[dict[str, Any]] = []
    errors: list[float] = []
    print(f"\n{Path(measured.model).name}: costs fitted to {len(seen)} loads, {len(unseen)} others foretold")
    print("streams × prompt   tokens/s measured  foretold  error   token ms measured  foretold  error")
    for run in unseen:
        said = predict(model, measured.engine, costs, run)
        rate, token = said.tokens_per_s / run.tokens_per_s - 1, said.tpot_s / run.tpot_s - 1
        errors += [abs(rate), abs(token)]
        figures = {"tokens_per_s": said.tokens_per_s, "tpot_s": said.tpot_s, "ttft_s": said.ttft_s}
        rows.append({"run": asdict(run)} | figures | {"tokens_per_s_error": rate, "tpot_error": token})
        print(
            f"{run.streams:7d} × {run.prompt:<6d} {run.tokens_per_s:16.1f} {said.tokens_per_s:10.1f} {rate:+7.1%}"
            f" {run.tpot_s * 1e3:16.2f} {said.tpot_s * 1e3:10.2f} {token:+7.1%}"
        )
    within = sum(error <= BOUND for error in errors)
    largest, middle = max(errors), statistics.median(errors)
    print(f"{within} of {len(errors)} within {BOUND:.0%}; largest {largest:.1%}, median {middle:.1%}")
    return {
        "file": file.name,
        "model": Path(measured.model).name,
        "costs": asdict(costs),
        "foretold": rows,
        "largest_error": largest,
        "median_error": middle,
        "within_bound": within,
        "figures": len(errors),
        "seconds": time.perf_counter() - start_s,
    }


def halves(measured: Measured) -> tuple[list[Run], list[Run]]:
    """Like a chessboard over streams and prompts, so that neither half lacks a number of streams or a length."""
    streams = sorted({run.streams for run in measured.runs})
    prompts = sorted({run.prompt for run in measured.runs})
    seen: list[Run] = []
    unseen: list[Run] = []
    for run in measured.runs:
        place = streams.index(run.streams) + prompts.index(run.prompt)
        (unseen if place % 2 else seen).append(run)
    return seen, unseen


if __name__ == "__main__":
    main()
