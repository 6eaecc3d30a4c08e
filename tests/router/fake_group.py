"""A ShardGroup without processes: FakeRanks behind the interface, and levers to hold steps back or lose a rank."""

from __future__ import annotations

import asyncio
from collections import deque

from cluster.errors import RankLost
from cluster.router.shards import GroupInfo, OnProgress
from tests.fakes import FakeRanks
from workers.step import RankLoading, RankReady, StepPlan, StepResult

BLOCK_SIZE = 4


class FakeShardGroup:
    """Executes a plan when its result is asked for; `hold` keeps results back until `release`."""

    def __init__(self, ranks: FakeRanks, on_progress: OnProgress, start_error: str | None = None) -> None:
        self.ranks = ranks
        self.num_stops = 0
        self._on_progress = on_progress
        self._start_error = start_error
        self._plans: deque[StepPlan] = deque()
        self._lost: str | None = None
        self._changed = asyncio.Event()
        self._flowing = asyncio.Event()
        self._flowing.set()

    def hold(self) -> None:
        self._flowing.clear()

    def release(self) -> None:
        self._flowing.set()

    def lose_rank(self, message: str = "rank 1 was killed by SIGKILL") -> None:
        self._lost = message
        self._flowing.set()
        self._changed.set()

    async def start(self) -> GroupInfo:
        self._on_progress(RankLoading(0, 5, 10))
        if self._start_error is not None:
            raise RankLost(self._start_error, rank=0)
        return GroupInfo([_ready(rank, len(self.ranks.memory), self.ranks.block_size) for rank in (0, 1)])

    def send(self, plan: StepPlan) -> None:
        self._plans.append(plan)
        self._changed.set()

    async def receive(self) -> StepResult:
        await asyncio.sleep(0)  # a real step takes at least a turn of the loop
        while True:
            await self._flowing.wait()
            if self._lost is not None:
                raise RankLost(self._lost, rank=1)
            if self._plans:
                return self.ranks.execute(self._plans.popleft())
            self._changed.clear()
            await self._changed.wait()

    async def stop(self) -> None:
        self.num_stops += 1


def _ready(rank: int, num_blocks: int, block_size: int) -> RankReady:
    return RankReady(rank, 1000 + rank, "here", "cpu", num_blocks, block_size, weight_bytes=1, kv_bytes=2, load_s=0.5)
