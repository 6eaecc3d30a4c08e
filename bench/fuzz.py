"""Fuzzes each target for as long as asked: python -m bench.fuzz --minutes 10 [TARGET ...]

Prints a line per target: inputs tried, faults found, and what the process grew by after a first round that fills
caches. A fault is shown with its smallest input and its seed, and makes the exit code 1. So does growth over 64 MiB:
ten minutes of a target gave 21 MiB at most, what caches and the allocator keep, and a leak goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from tests.fuzzing.echo_site import EchoSite, echo_site
from tests.fuzzing.http_calls import POST_OPERATIONS, fault_of, http_calls
from tests.fuzzing.targets import OURS, TARGETS, Target, end_of, grpc_calls

EXAMPLES_PER_ROUND = 500
MOST_GROWN_MIB = 64
PORTS = ("grpc-port", *(f"http-port{path}" for path in POST_OPERATIONS))


@dataclass
class Outcome:
    """What a target's run gave."""

    target: str
    minutes: float
    num_inputs: int
    num_faults: int
    grown_mib: float
    """Resident memory at the end over that after the first round."""

    @property
    def is_good(self) -> bool:
        return not self.num_faults and self.grown_mib <= MOST_GROWN_MIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default all: {', '.join((*TARGETS, *PORTS))}")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each target")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the outcomes as JSON")
    args = parser.parse_args()
    outcomes = []
    with contextlib.ExitStack() as stack:
        site: list[EchoSite] = []

        def running_site() -> EchoSite:
            if not site:
                site.append(stack.enter_context(echo_site()))
            return site[0]

        for name in args.targets or (*TARGETS, *PORTS):
            target = TARGETS[name]() if name in TARGETS else _port_target(name, running_site())
            outcomes.append(_run(name, target, args.minutes, args.first_seed))
            print(json.dumps(asdict(outcomes[-1])), flush=True)
        if site:
            left = site[0].leftovers()
            print(f"left behind: {left}")
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    return 1 if any(not outcome.is_good for outcome in outcomes) else 0


def _port_target(name: str, site: EchoSite) -> Target:
    if name == "grpc-port":
        channel = grpc.insecure_channel(f"127.0.0.1:{site.ports.grpc}")

        def check_call(call: tuple[str, bytes]) -> None:
            assert end_of(channel, *call) not in OURS

        return Target(grpc_calls(), check_call)

    def check_http(call: Any) -> None:
        assert fault_of(call, f"http://127.0.0.1:{site.ports.http}") is None

    return Target(http_calls(name.removeprefix("http-port")), check_http)


def _run(name: str, target: Target, minutes: float, first_seed: int) -> Outcome:
    end_s = time.monotonic() + 60 * minutes
    outcome = Outcome(name, minutes, 0, 0, 0.0)
    first_bytes: int | None = None
    for number in _while(lambda: time.monotonic() < end_s):
        outcome.num_inputs += _round(target, first_seed + number, outcome)
        gc.collect()
        now_bytes = psutil.Process().memory_info().rss
        first_bytes = first_bytes or now_bytes
        outcome.grown_mib = round((now_bytes - first_bytes) / 2**20, 1)
    return outcome


def _while(condition: Callable[[], bool]) -> Iterator[int]:
    number = 0
    while condition():
        yield number
        number += 1


def _round(target: Target, number: int, outcome: Outcome) -> int:
    """Inputs of one seed; a fault ends it, once its smallest input is found."""
    count = [0]

    @seed(number)
    @settings(
        max_examples=EXAMPLES_PER_ROUND,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        verbosity=Verbosity.quiet,
    )
    @given(value=target.inputs)
    def shoot(value: object) -> None:
        count[0] += 1
        target.check(value)

    try:
        shoot()
    except Exception:  # whatever it was is a fault of ours: it is counted, and the next round goes on
        outcome.num_faults += 1
        print(f"seed {number}:", file=sys.stderr)
        traceback.print_exc()
    return count[0]


if __name__ == "__main__":
    sys.exit(main())
