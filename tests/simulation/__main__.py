"""Replay a run, or look for one that fails.

python -m tests.simulation --seed 7            one run, with a trace of all that happens
python -m tests.simulation --seed 7 --runs 1000
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter

from tests.simulation.simulation import Failure, Simulation, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first run's")
    parser.add_argument("--runs", type=int, help="so many runs, with the seeds that follow, and no trace")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    return _replay(options.seed) if options.runs is None else _search(options.seed, options.runs)


def _replay(seed: int) -> int:
    simulation = Simulation(seed, keep_trace=True)
    try:
        report = simulation.run()
    except Exception as error:
        print(*(simulation.world.trace or []), sep="\n")
        print(f"seed {seed} fails at {simulation.world.now_s * 1000:.3f} ms: {error}")
        raise
    print(*(report.trace or []), sep="\n")
    print(f"seed {seed} holds: {dict(report.counts)}")
    return 0


def _search(first: int, num_runs: int) -> int:
    failed: list[str] = []
    counts: Counter[str] = Counter()
    start_s = time.perf_counter()
    for seed in range(first, first + num_runs):
        try:
            counts.update(run(seed).counts)
        except Failure as error:
            failed.append(str(error))
            print(error, flush=True)
    took_s = time.perf_counter() - start_s
    print(*(f"{name}: {count}" for name, count in sorted(counts.items())), sep="\n")
    print(f"{num_runs} runs in {took_s:.1f} s ({took_s / num_runs * 1000:.1f} ms each), {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
