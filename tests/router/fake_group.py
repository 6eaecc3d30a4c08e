"""A ShardGroup without processes: FakeRanks behind the interface, and levers to hold steps back or lose a rank.

Every attention group has two ranks, of which the first names tokens.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence

from msgspec.structs import replace

from cluster.errors import RankLost
from cluster.router.shards import GroupInfo, OnProgress, Survivors
from tests.fakes import FakeRanks
from workers.layout import ParallelLayout
from workers.placement_map import EMPTY_SLOT, placement_problem
from workers.step import PlacementUpdate, RankLoading, RankReady, StepPlan, StepResult

BLOCK_SIZE = 4


class FakeExperts:
    """Counts tokens in physical slots; replicas share them evenly. `shares` are those of each layer's experts."""

    def __init__(self, shares: list[list[float]], placement: list[int]) -> None:
        self.shares = shares
        self.placement = [placement] * len(shares)
        self.versions: list[int] = []
        self._counts = [[0.0] * len(placement) for _ in shares]

    def count(self, num_tokens: int) -> None:
        for shares, placement, counts in zip(self.shares, self.placement, self._counts, strict=True):
            replicas = Counter(placement)
            for slot, expert in enumerate(placement):
                if expert != EMPTY_SLOT:
                    counts[slot] += num_tokens * shares[expert] / replicas[expert]

    def place(self, update: PlacementUpdate) -> None:
        for shares, old, new in zip(self.shares, self.placement, update.layers, strict=True):
            assert placement_problem(new, len(shares), len(old)) is None
        self.versions.append(update.version)
        self.placement = update.layers

    def take(self, num_ranks: int) -> list[list[list[int]]]:
        """Each rank's loads since the last call."""
        size = len(self.placement[0]) // num_ranks
        taken = [
            [[round(count) for count in counts[rank * size : (rank + 1) * size]] for counts in self._counts]
            for rank in range(num_ranks)
        ]
        self._counts = [[0.0] * len(counts) for counts in self._counts]
        return taken


class FakeShardGroup:
    """Executes a plan when its result is asked for; `hold` keeps results back until `release`.

    It is as fast as the machine: what a test wants to meet in the middle is let go by so many steps.
    """

    def __init__(
        self,
        ranks: Sequence[FakeRanks],
        on_progress: OnProgress,
        start_error: str | None = None,
        experts: FakeExperts | None = None,
    ) -> None:
        self.ranks = ranks
        self.layout = ParallelLayout(tp=2, dp=len(ranks))
        self.experts = experts
        self.num_stops = 0
        self.step_s = 0.0
        self.silence_s = 0.0
        self.deadly_token: int | None = None
        """Ranks fail that are to put it through the model."""
        self._on_progress = on_progress
        self.may_start: asyncio.Event | None = None
        self._start_error = start_error
        self._orders: deque[list[StepPlan] | PlacementUpdate] = deque()
        self._lost: str | None = None
        self._changed = asyncio.Event()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._num_let_go: int | None = None
        """Steps until it holds again; None: it does not."""

    def hold(self) -> None:
        self._flowing.clear()

    def release(self, num_steps: int | None = None) -> None:
        """All that comes, or the results of so many steps."""
        self._num_let_go = num_steps
        self._flowing.set()

    def lose_rank(self, message: str = "rank 1 was killed by SIGKILL") -> None:
        self._lost = message
        self._flowing.set()
        self._changed.set()

    async def start(self) -> GroupInfo:
        self._on_progress(RankLoading(0, 5, 10))
        if self.may_start is not None:
            await self.may_start.wait()
        if self._start_error is not None:
            raise RankLost(self._start_error, rank=0)
        num_blocks, block_size = len(self.ranks[0].memory), self.ranks[0].block_size
        return GroupInfo(self.layout, [_ready(rank, num_blocks, block_size) for rank in range(self.layout.world_size)])

    def send(self, plans: list[StepPlan]) -> None:
        self._orders.append(plans)
        self._changed.set()

    def place(self, update: PlacementUpdate) -> None:
        self._orders.append(update)

    async def receive(self) -> list[StepResult]:
        await asyncio.sleep(self.step_s)  # a real step takes at least a turn of the loop
        while True:
            await self._flowing.wait()
            if self._lost is not None:
                raise RankLost(self._lost, rank=1, was_killed="killed" in self._lost)
            if self._orders:
                order = self._orders.popleft()
                if not isinstance(order, PlacementUpdate):
                    return self._execute(order)
                assert self.experts is not None, "a placement came to ranks without experts"
                self.experts.place(order)
                continue
            self._changed.clear()
            await self._changed.wait()

    def _execute(self, plans: list[StepPlan]) -> list[StepResult]:
        if self._num_let_go is not None:
            self._num_let_go -= 1
            if not self._num_let_go:
                self.hold()
        if any(self.deadly_token in prefill.token_ids for plan in plans for prefill in plan.prefills):
            raise RankLost("rank 1 failed: RuntimeError: a token that no kernel can bear", rank=1)
        results = []
        for group, (ranks, plan) in enumerate(zip(self.ranks, plans, strict=True)):
            first = group * self.layout.tp
            results += [replace(ranks.execute(plan), rank=first), StepResult(plan.step, first + 1)]
        if self.experts is None:
            return results
        self.experts.count(sum(plan.num_tokens for plan in plans))
        if not plans[0].report_loads:
            return results
        loads = self.experts.take(self.layout.world_size)
        return [replace(result, expert_loads=loads[result.rank]) for result in results]

    async def dissolve(self) -> Survivors:
        return {}

    async def stop(self) -> None:
        self.num_stops += 1


def _ready(rank: int, num_blocks: int, block_size: int) -> RankReady:
    return RankReady(rank, 1000 + rank, "here", "cpu", num_blocks, block_size, weight_bytes=1, kv_bytes=2, load_s=0.5)
