"""A rank's process without torch: the real loop of workers.shard around a runner that does what its scenario says.

The scenario is `RunnerConfig.model_dir`: "good", or a failure and the rank that has it, as in "dies:1". In
"device-hangs:1" all ranks have devices, which are done when the rank is woken; that of rank 1 never is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import NamedTuple

from workers import shard
from workers.errors import CheckpointError, PeerLate
from workers.launched import BeforeWait, Done, Launched
from workers.shard import Progress, Runner, ShardConfig, main
from workers.step import PlacementUpdate, StepPlan, StepResult

NUM_BLOCKS = 100


class DeviceStep(NamedTuple):
    """Under way; its tokens would be garbage."""

    garbage: StepResult
    done: threading.Event

    def is_done(self) -> bool:
        return self.done.is_set()

    def result(self) -> StepResult:
        self.done.wait()
        return self.garbage


class FakeRunner:
    """Rank r has NUM_BLOCKS + r blocks; its tokens are 7s, its load is the placement."""

    weight_bytes = 1000
    kv_bytes = 2000
    host_memory = None

    num_exchanges = num_group_exchanges = 0

    def __init__(self, config: ShardConfig, progress: Progress, previous: Runner | None) -> None:
        self._rank = config.runner.rank
        self._names_tokens = config.runner.rank % config.runner.layout.tp == 0
        self._placement = 0
        self.num_blocks = NUM_BLOCKS + self._rank
        scenario, _, rank = config.runner.model_dir.partition(":")
        self._scenario = scenario if rank == str(self._rank) else "good"
        self._has_device = scenario == "device-hangs" and previous is None
        self._left = threading.Event()
        if self._scenario == "cannot-leave":
            shard.LEAVE_TIMEOUT_S = 0.5
        if previous is not None:
            self._scenario = "good"  # what it had, it had once
            return
        progress(0, 1000)
        self._load()
        progress(1000, 1000)

    def _load(self) -> None:
        if self._scenario == "bad-checkpoint":
            raise CheckpointError("/models/x/model.safetensors: truncated at byte 7; download it again")
        if self._scenario == "dies-loading":
            sys.exit(9)
        if self._scenario == "loads-forever":
            threading.Event().wait()

    def launch(self, plan: StepPlan, before_wait: BeforeWait) -> Launched:
        del before_wait
        if self._has_device:
            is_done = threading.Event() if self._scenario == "device-hangs" else self._left
            return DeviceStep(StepResult(plan.step, self._rank), is_done)
        return Done(self.execute(plan))

    def execute(self, plan: StepPlan) -> StepResult:
        if self._scenario == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._scenario == "fails":
            raise ValueError("matrix of\nno rank")
        if self._scenario == "hangs":
            threading.Event().wait()
        if self._scenario == "waits-for-others" and not self._left.wait(60):
            raise TimeoutError("nobody woke it")
        if self._left.is_set():
            raise PeerLate("the others are gone")
        if self._scenario == "skips":
            return StepResult(plan.step + 1, self._rank)
        loads = [[self._placement]] if plan.report_loads else []
        token_ids = [7] * len(plan.sampling_slots) if self._names_tokens else []
        return StepResult(plan.step, self._rank, token_ids, expert_loads=loads)

    def abort(self) -> None:
        self._left.set()

    def forget(self) -> None:
        pass

    def leave(self) -> None:
        if self._scenario == "cannot-leave":
            threading.Event().wait()

    def place(self, update: PlacementUpdate) -> None:
        self._placement = update.version


if __name__ == "__main__":
    sys.exit(main(FakeRunner))
