"""mull beside llama.cpp, vLLM and transformers: throughput, times to tokens and memory, in one interleaved run.

    python -m bench.peers [--full] [--shapes pocket,dense-0.6b,moe-1.5b] [--engines …] [--out FILE] [--plot PNG]

Each engine runs in its own process on the same weights, threads and prompts: greedy, stop tokens ignored, prompts
random and new in each round. On each cell the engines take turns; those that are not asked are stopped (SIGSTOP), and
a peer less than half as fast as the fastest has one turn.
Figures come from the times of tokens inside each engine's process. `make bench-peers` installs the peers first.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.peers.cells import Cell, grid
from bench.peers.checkpoints import SHAPES, Checkpoints
from bench.peers.measure import ShapeBench
from bench.peers.plot import plot
from bench.peers.registry import ENGINES, LLAMA
from bench.peers.results import ShapeResult
from bench.peers.tables import print_limits, print_shape, print_targets
from bench.peers.targets import Target, targets
from bench.report import machine, write

DEFAULT_SHAPES = "pocket,dense-0.6b,moe-1.5b"
RESULTS = Path("bench/results")
VERSIONS = "import importlib.metadata as m, sys; print(*[m.version(name) for name in sys.argv[1:]])"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the whole grid of loads and prompts: hours")
    parser.add_argument("--shapes", default=DEFAULT_SHAPES, help=f"of {', '.join(SHAPES)}; the 4b: one stream alone")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--cells", help="instead of the grid: STREAMSxPROMPT+OUT, …")
    parser.add_argument("--rounds", type=int, help="instead of the grid's own number")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("build/peers"), help="checkpoints and logs")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "peers.png")
    return parser.parse_args()


def cells(args: argparse.Namespace, shape: str) -> list[Cell]:
    found = grid(shape, full=args.full)
    if args.cells:
        found = [Cell.parse(text) for text in args.cells.split(",")]
    return [cell if args.rounds is None else cell.with_rounds(args.rounds) for cell in found]


def engine_versions(names: list[str]) -> dict[str, str]:
    """By engine, as installed in its own environment; those that are not installed are missing."""
    found = {}
    for name in names:
        spec = ENGINES[name]
        if spec.python.exists():
            command = [spec.python, "-c", VERSIONS, *spec.packages]
            numbers = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            found[name] = ", ".join(f"{it} {number}" for it, number in zip(spec.packages, numbers, strict=True))
    return found


def main() -> None:
    args = arguments()
    # As Ctrl-C: the engines' processes are ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # All engines inherit it: the same cores for each.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    names, started_s = args.engines.split(","), time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 150)
    about: dict[str, Any] = {"machine": machine(), "threads": args.threads, "versions": engine_versions(names)}
    console.print(about)
    results: list[ShapeResult] = []
    promises: dict[str, list[Target]] = {}

    def save() -> None:
        """What there is: a run that is cut leaves it."""
        for result in results:
            promises[result.shape] = targets(result, Checkpoints(SHAPES[result.shape], args.work, LLAMA).work)
        about["shapes"] = {result.shape: result.as_json() for result in results}
        about["targets"] = [{**asdict(it), "met": it.met} for found in promises.values() for it in found]
        about["minutes"] = round((time.monotonic() - started_s) / 60, 1)
        write(args.out, about)

    try:
        for name in args.shapes.split(","):
            checkpoints = Checkpoints(SHAPES[name], args.work, LLAMA)
            bench = ShapeBench(checkpoints, cells(args, name), args.threads, args.work / "logs", _tell)
            results.append(bench.result)
            bench.run(names, save)
            print_shape(console, bench.result)
    finally:
        save()
        print_limits(console, results)
        print_targets(console, [target for found in promises.values() for target in found])
        plot(results, args.plot)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
