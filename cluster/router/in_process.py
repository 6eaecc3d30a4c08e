"""InProcessGroup: one rank in a thread of this process, for tests, benches and machines with little memory.

Hop 6 without a socket. The same interface as `shards.RankGroup`; only one rank, and a hung step can only be reported.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from cluster.errors import EngineError, MullError, RankLossCause, RankLost
from cluster.router.shard_group import GroupBounds, GroupInfo, OnProgress, Survivors
from workers.config import RunnerConfig
from workers.shard import Runner, RunnerFactory, ShardConfig, load_runner
from workers.step import PlacementUpdate, RankLoading, RankReady, StepPlan, StepResult

log = logging.getLogger(__name__)


class InProcessGroup:
    """Runs plans in order on one thread of its own."""

    def __init__(
        self,
        config: RunnerConfig,
        bounds: GroupBounds,
        on_progress: OnProgress,
        build_runner: RunnerFactory = load_runner,
    ) -> None:
        if config.layout.world_size != 1:
            world = config.layout.world_size
            raise EngineError(f"an in-process group has one rank, the layout has {world}; use processes")
        self._config = config
        self._bounds = bounds
        self._on_progress = on_progress
        self._build_runner = build_runner
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rank 0")
        self._steps: deque[Future[StepResult]] = deque()
        self._runner: Runner | None = None
        self._sent = asyncio.Event()

    async def start(self) -> GroupInfo:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._bounds.start_timeout_s):
                rank = await loop.run_in_executor(self._thread, self._load, loop)
                return GroupInfo(self._config.layout, [rank])
        except TimeoutError:
            late = f"rank 0 was not ready within {self._bounds.start_timeout_s:g} s"
            raise RankLost(late, rank=0, cause=RankLossCause.LATE) from None
        except MullError as error:
            raise RankLost(f"rank 0 failed: {error}", rank=0) from error

    def _load(self, loop: asyncio.AbstractEventLoop) -> RankReady:
        def progress(read_bytes: int, total_bytes: int) -> None:
            loop.call_soon_threadsafe(self._on_progress, RankLoading(0, read_bytes, total_bytes))

        started_at = time.monotonic()
        runner = self._runner = self._build_runner(ShardConfig(runner=self._config, endpoint=""), progress, None)
        return RankReady(
            rank=0,
            pid=os.getpid(),
            host=socket.gethostname(),
            device=self._config.device,
            num_blocks=runner.num_blocks,
            block_size=self._config.block_size,
            weight_bytes=runner.weight_bytes,
            kv_bytes=runner.kv_bytes,
            load_s=time.monotonic() - started_at,
            host_memory=runner.host_memory,
        )

    @property
    def silence_s(self) -> float:
        return 0.0  # a thread of this process lives as long as it does

    def send(self, plans: list[StepPlan]) -> None:
        assert self._runner is not None, "send before start"
        (plan,) = plans
        self._steps.append(self._thread.submit(self._runner.execute, plan))
        self._sent.set()

    def place(self, update: PlacementUpdate) -> None:
        raise EngineError(f"placement {update.version} came to a group of one rank, which has all experts already")

    async def receive(self) -> list[StepResult]:
        while not self._steps:
            self._sent.clear()
            await self._sent.wait()
        step = asyncio.wrap_future(self._steps[0])
        try:
            # Shielded: a caller that is cancelled must find the step again.
            result = await asyncio.wait_for(asyncio.shield(step), self._bounds.step_timeout_s)
        except TimeoutError:
            late = f"rank 0 was late: no result within {self._bounds.step_timeout_s:g} s"
            raise RankLost(late, rank=0, cause=RankLossCause.LATE) from None
        except Exception as error:
            log.exception("rank 0 failed")
            raise RankLost(f"rank 0 failed: {type(error).__name__}: {error}", rank=0) from error
        self._steps.popleft()
        return [result]

    async def dissolve(self) -> Survivors:
        """A thread that failed has nothing that another group could use."""
        await self.stop()
        return {}

    async def stop(self) -> None:
        """Does not wait for a step that runs: the thread ends after it."""
        self._thread.shutdown(wait=False, cancel_futures=True)
