"""Millions of random fault schedules of the deterministic simulation, on all cores: does any seed break a promise?

    python -m bench.soak [--runs 1000000] [--first-seed 0] [--processes N] [--out FILE]

A seed that fails is printed at once; `python -m tests.simulation --seed N` replays it with a trace. Ctrl-C ends it with
what it has found so far.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from bench.report import machine, versions, write
from tests.simulation.simulation import Failure, run

CHUNK = 500
SHOW_EVERY_S = 30.0


def soak_chunk(first_seed: int) -> tuple[Counter[str], list[str]]:
    """What happened in the runs of a chunk, and what failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent's to end us
    logging.disable(logging.CRITICAL)
    counts: Counter[str] = Counter()
    failed: list[str] = []
    for seed in range(first_seed, first_seed + CHUNK):
        try:
            counts += run(seed).counts
        except Failure as error:
            failed.append(str(error))
    return counts, failed


def soak(first_seed: int, num_runs: int, num_processes: int) -> Iterator[tuple[Counter[str], list[str]]]:
    """Chunk by chunk, in order."""
    chunks = range(first_seed, first_seed + num_runs, CHUNK)
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        yield from pool.imap(soak_chunk, chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000, help=f"rounded up to a multiple of {CHUNK}")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start_s = shown_s = time.monotonic()
    counts: Counter[str] = Counter()
    failed: list[str] = []
    num_done = 0
    with suppress(KeyboardInterrupt):
        for more, broken in soak(options.first_seed, options.runs, options.processes):
            counts += more
            failed += broken
            num_done += CHUNK
            for line in broken:
                print(line, flush=True)
            if time.monotonic() - shown_s > SHOW_EVERY_S:
                shown_s = time.monotonic()
                speed = num_done / (shown_s - start_s)
                print(f"{num_done:,} runs, {len(failed)} failed, {speed:.0f} a second", flush=True)
    took_s = time.monotonic() - start_s
    host = machine()
    print(host)
    print(*(f"{name:24} {count:12,}" for name, count in sorted(counts.items())), sep="\n")
    print(f"{num_done:,} runs in {took_s:.0f} s, {len(failed)} failed")
    report = {"runs": num_done, "failed": failed, "seconds": took_s, "first_seed": options.first_seed, "counts": counts}
    write(options.out, {"machine": host, "versions": versions("msgspec", "protobuf"), **report})


if __name__ == "__main__":
    main()
