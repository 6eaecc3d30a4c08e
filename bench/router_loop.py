"""What a step costs besides the model: plan out to ranks that compute nothing, all answers back.

    python -m bench.router_loop [--tp 2] [--steps 5000] [--slots 32]

Prints the round trip of one step (send, wait) and the time per step with one plan ahead, as the Router sends them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import time

import msgspec
import zmq

from cluster.router.launchers import ProcessLauncher
from cluster.router.shard_group import GroupBounds
from cluster.router.shards import RankGroup
from workers.config import RunnerConfig
from workers.launched import BeforeWait, Done, Launched
from workers.layout import ParallelLayout
from workers.shard import Progress, Runner, ShardConfig, main
from workers.step import PlacementUpdate, StepPlan, StepResult


class NullRunner:
    """Answers at once."""

    num_blocks = 1
    weight_bytes = 0
    kv_bytes = 0
    host_memory = None
    num_exchanges = num_group_exchanges = 0

    def __init__(self, config: ShardConfig, progress: Progress, previous: Runner | None) -> None:
        del progress, previous
        self._rank = config.runner.rank

    def place(self, update: PlacementUpdate) -> None:
        del update

    def abort(self) -> None:
        pass

    def forget(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def launch(self, plan: StepPlan, before_wait: BeforeWait) -> Launched:
        del before_wait
        return Done(self.execute(plan))

    def execute(self, plan: StepPlan) -> StepResult:
        return StepResult(plan.step, self._rank, [7] * len(plan.decodes) if self._rank == 0 else [])


async def measure(tp: int, num_steps: int, slots: list[int]) -> None:
    runners = [RunnerConfig(model_dir="", rank=rank, layout=ParallelLayout(tp=tp)) for rank in range(tp)]
    launcher = ProcessLauncher([sys.executable, "-m", "bench.router_loop", "--as-rank"])
    group = RankGroup(launcher, runners, GroupBounds(), lambda _: None)
    await group.start()
    try:
        round_trips_s = sorted([await _round_trip(group, step, slots) for step in range(num_steps)])
        ahead_s = await _one_ahead(group, num_steps, num_steps, slots)
    finally:
        await group.stop()
    p50_us, p99_us = (1e6 * round_trips_s[int(share * num_steps)] for share in (0.5, 0.99))
    round_trip = f"round trip p50 {p50_us:.0f} µs, p99 {p99_us:.0f} µs"
    print(f"tp={tp} slots={len(slots)}: {round_trip}; one plan ahead {1e6 * ahead_s:.0f} µs a step")


async def _round_trip(group: RankGroup, step: int, slots: list[int]) -> float:
    started_s = time.perf_counter()
    group.send([StepPlan(step, decodes=slots)])
    await group.receive()
    return time.perf_counter() - started_s


async def _one_ahead(group: RankGroup, first: int, num_steps: int, slots: list[int]) -> float:
    started_s = time.perf_counter()
    group.send([StepPlan(first, decodes=slots)])
    for step in range(first + 1, first + num_steps):
        group.send([StepPlan(step, decodes=slots)])
        await group.receive()
    await group.receive()
    return (time.perf_counter() - started_s) / num_steps


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--slots", type=int, default=32)
    args = parser.parse_args()
    versions = f"Python {platform.python_version()}, zmq {zmq.zmq_version()}, msgspec {msgspec.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}")
    asyncio.run(measure(args.tp, args.steps, list(range(args.slots))))


if __name__ == "__main__":
    sys.exit(main(NullRunner)) if "--as-rank" in sys.argv else run()
