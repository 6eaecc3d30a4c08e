"""ShardGroup: the ranks of one copy, started, stepped, watched and stopped together.

Hop 6, the Router's side. A rank gets the plan of its attention group; a step is complete when every rank has answered.
Losing one rank loses all. Knows nothing of sequences, gateways or what a plan means.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.errors import EngineError, RankLost
from cluster.router.gather import Casualties, StepGather
from cluster.router.launchers import Launcher, RankHandle
from cluster.router.rank_socket import RankSocket
from cluster.router.rendezvous import Rendezvous
from workers.config import RunnerConfig
from workers.layout import ParallelLayout
from workers.shard import ShardConfig
from workers.step import (
    FromRank,
    PlacementUpdate,
    RankFailed,
    RankLoading,
    RankReady,
    Shutdown,
    StepPlan,
    StepResult,
    encode,
)

log = logging.getLogger(__name__)

OnProgress = Callable[[RankLoading], None]


@dataclass(frozen=True)
class GroupInfo:
    """Ranks that can take plans."""

    layout: ParallelLayout
    ranks: list[RankReady]
    """All of them, in order."""

    @property
    def num_blocks(self) -> int:
        """KV blocks that every rank has: the pool of one attention group."""
        return min(rank.num_blocks for rank in self.ranks)

    @property
    def block_size(self) -> int:
        return self.ranks[0].block_size


class Steps(Protocol):
    """Plans out, results in."""

    def send(self, plans: list[StepPlan]) -> None:
        """One step: a plan for each attention group, all of one number. Never waits; a loss shows in `receive`."""

    async def receive(self) -> list[StepResult]:
        """The results of the oldest outstanding step, when every rank has answered it; in rank order.

        One caller at a time; may be cancelled. Raises RankLost naming the rank that died, failed, or
        was late; also while no step is outstanding.
        """


class ShardGroup(Steps, Protocol):
    """One start, then steps, then one stop. Not usable again: a lost group is replaced by a new one."""

    async def start(self) -> GroupInfo:
        """Raises RankLost (with the rank's own words) when a rank fails or is late; everything is stopped by then."""

    def place(self, update: PlacementUpdate) -> None:
        """Tell every rank where experts lie from the next step on. Never waits; a loss shows in `receive`."""

    async def stop(self) -> None:
        """Bounded; may be called again."""


@dataclass(frozen=True, kw_only=True)
class GroupBounds:
    """How long a group may take for what."""

    start_timeout_s: float = 600.0
    step_timeout_s: float = 60.0
    stop_timeout_s: float = 5.0
    """After Shutdown; then SIGTERM, then SIGKILL."""


class RankGroup:
    """Ranks that a launcher started, on a socket."""

    def __init__(
        self, launcher: Launcher, runners: Sequence[RunnerConfig], bounds: GroupBounds, on_progress: OnProgress
    ) -> None:
        self._launcher = launcher
        self._runners = runners
        self._bounds = bounds
        self._on_progress = on_progress
        self._layout = runners[0].layout
        self._gather = StepGather(self._layout)
        self._casualties = Casualties()
        self._handles: list[RankHandle] = []
        self._watches: list[asyncio.Task[None]] = []
        self._ready: dict[int, RankReady] = {}
        self._results: deque[list[StepResult]] = deque()
        self._changed: asyncio.Future[None] | None = None
        self._lost: RankLost | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._socket: RankSocket | None = None
        self._rendezvous: Rendezvous | None = None
        self._stopping = False

    # Start

    async def start(self) -> GroupInfo:
        try:
            async with asyncio.timeout(self._bounds.start_timeout_s):
                socket = await self._launch()
                while len(self._ready) < len(self._runners):
                    await self._wait_for_change()
                socket.remove_address()
        except TimeoutError:
            await self.stop()
            raise self._late_start() from None
        except BaseException:
            await self.stop()
            raise
        return GroupInfo(self._layout, [self._ready[rank] for rank in sorted(self._ready)])

    async def _launch(self) -> RankSocket:
        socket = self._socket = RankSocket(self._launcher.host, self._on_message)
        if len(self._runners) > 1:
            self._rendezvous = Rendezvous(self._launcher.host or "127.0.0.1")
        for runner in self._runners:
            handle = await self._launcher.launch(self._shard_config(runner, socket.endpoint))
            self._handles.append(handle)
            self._watches.append(asyncio.create_task(self._watch(handle), name=f"watch rank {handle.rank}"))
        if self._rendezvous is not None:
            await self._rendezvous.open()
        return socket

    def _shard_config(self, runner: RunnerConfig, endpoint: str) -> ShardConfig:
        return ShardConfig(
            runner=runner,
            endpoint=endpoint,
            store_host=self._rendezvous.host if self._rendezvous else None,
            store_port=self._rendezvous.port if self._rendezvous else None,
            connect_timeout_s=self._bounds.start_timeout_s,
        )

    def _late_start(self) -> RankLost:
        late = [runner.rank for runner in self._runners if runner.rank not in self._ready]
        return RankLost(
            f"{_ranks(late)} not ready within {self._bounds.start_timeout_s:g} s; "
            "raise router.start_timeout_s if loading takes longer",
            rank=late[0],
        )

    # Steps

    def send(self, plans: list[StepPlan]) -> None:
        if self._lost:
            return
        for group, plan in enumerate(plans):
            first = group * self._layout.tp
            self._send_to(range(first, first + self._layout.tp), encode(plan))
        self._gather.sent(plans[0].step)
        if self._deadline is None:
            self._set_deadline()

    def place(self, update: PlacementUpdate) -> None:
        if not self._lost:
            self._send_to(range(self._layout.world_size), encode(update))

    def _send_to(self, ranks: Iterable[int], data: bytes) -> None:
        assert self._socket is not None, "send before start"
        for rank in ranks:
            if not self._socket.send(rank, data):
                self._casualties.unreachable(rank)
                self._settle()

    async def receive(self) -> list[StepResult]:
        while not self._results:
            await self._wait_for_change()
        return self._results.popleft()

    async def _wait_for_change(self) -> None:
        """Until a result, a readiness or a loss. Raises RankLost at once when the group is lost."""
        if self._lost is not None:
            raise RankLost(str(self._lost), rank=self._lost.rank)
        self._changed = asyncio.get_running_loop().create_future()
        try:
            await self._changed
        finally:
            self._changed = None

    def _notify(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def _set_deadline(self) -> None:
        """The oldest step's time runs from when it became the oldest."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._gather.has_open_steps:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self._bounds.step_timeout_s, self._on_deadline)

    # Events

    def _on_message(self, message: FromRank) -> None:
        match message:
            case StepResult():
                self._on_result(message)
            case RankLoading():
                self._on_progress(message)
            case RankReady():
                self._ready[message.rank] = message
                self._notify()
            case RankFailed():
                if message.detail:
                    log.error("rank %d failed:\n%s", message.rank, message.detail)
                self._casualties.failed(message.rank, message.message)
                self._settle()

    def _on_result(self, result: StepResult) -> None:
        try:
            complete = self._gather.answered(result)
        except EngineError as error:
            self._lose(RankLost(str(error), rank=result.rank))
            return
        if complete is not None:
            self._results.append(complete)
            self._set_deadline()
            self._notify()

    def _on_deadline(self) -> None:
        late = self._gather.late_ranks
        self._lose(RankLost(f"{_ranks(late)} late: no result within {self._bounds.step_timeout_s:g} s", rank=late[0]))

    async def _watch(self, handle: RankHandle) -> None:
        how = await handle.wait()
        if not self._stopping:
            self._casualties.ended(handle.rank, how)
            self._settle()

    def _settle(self) -> None:
        """Wait a moment for what the other ranks report, so that the right one is blamed."""
        if self._settling is None and self._lost is None:
            loop = asyncio.get_running_loop()
            self._settling = loop.call_later(self._launcher.settle_s, self._judge)

    def _judge(self) -> None:
        self._lose(self._casualties.verdict())

    def _lose(self, error: RankLost) -> None:
        if self._lost is None and not self._stopping:
            self._lost = error
            self._notify()

    # Stop

    async def stop(self) -> None:
        self._stopping = True
        for timer in (self._deadline, self._settling):
            if timer is not None:
                timer.cancel()
        try:
            await self._end_ranks()
        finally:
            for watch in self._watches:
                watch.cancel()
            await asyncio.gather(*self._watches, return_exceptions=True)
            if self._socket is not None:
                self._socket.close()
            if self._rendezvous is not None:
                self._rendezvous.close()

    async def _end_ranks(self) -> None:
        """Ask, then SIGTERM, then SIGKILL. Ranks that load or have lost a peer would not hear us ask."""
        try:
            if self._lost is None and not self._casualties.any and len(self._ready) == len(self._runners):
                self._ask_to_end()
                await self._all_ended(self._bounds.stop_timeout_s)
            for handle in self._handles:
                handle.terminate()
            await self._all_ended(1.0)
        finally:
            for handle in self._handles:
                handle.kill()
        await self._all_ended(self._bounds.stop_timeout_s)

    def _ask_to_end(self) -> None:
        if self._socket is not None:
            for rank in self._ready:
                self._socket.send(rank, encode(Shutdown()))

    async def _all_ended(self, timeout_s: float) -> None:
        if self._watches:
            await asyncio.wait(self._watches, timeout=timeout_s)


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(str(rank) for rank in ranks)
    return f"rank {names} was" if len(ranks) == 1 else f"ranks {names} were"
