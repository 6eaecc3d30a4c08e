"""A rank's process without torch: the real loop of workers.shard around a runner that does what its scenario says.

The scenario is `RunnerConfig.model_dir`: "good", or a failure and the rank that has it, as in "dies:1".
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from workers.errors import CheckpointError
from workers.shard import Progress, ShardConfig, main
from workers.step import StepPlan, StepResult

NUM_BLOCKS = 100


class FakeRunner:
    """Rank r has NUM_BLOCKS + r blocks; every token is 7."""

    weight_bytes = 1000
    kv_bytes = 2000

    def __init__(self, config: ShardConfig, progress: Progress) -> None:
        self._rank = config.runner.rank
        self.num_blocks = NUM_BLOCKS + self._rank
        scenario, _, rank = config.runner.model_dir.partition(":")
        self._scenario = scenario if rank == str(self._rank) else "good"
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

    def execute(self, plan: StepPlan) -> StepResult:
        if self._scenario == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._scenario == "fails":
            raise ValueError("matrix of\nno rank")
        if self._scenario == "hangs":
            threading.Event().wait()
        if self._scenario == "skips":
            return StepResult(plan.step + 1, self._rank)
        return StepResult(plan.step, self._rank, [7] * len(plan.sampling_slots) if self._rank == 0 else [])


if __name__ == "__main__":
    sys.exit(main(FakeRunner))
