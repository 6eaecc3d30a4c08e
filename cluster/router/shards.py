"""ShardGroup: the ranks of one copy, started, stepped, watched and stopped together.

Hop 6, the Router's side. A rank gets the plan of its attention group; a step is complete when every rank has answered.
Losing one rank loses all. Knows nothing of sequences, gateways or what a plan means.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from cluster.errors import EngineError, RankLossCause, RankLost
from cluster.router.gather import Casualties, StepGather
from cluster.router.late import Pulses, RollCall, late_start, lateness, ranks_were
from cluster.router.launchers import Launcher, RankHandle
from cluster.router.rank_socket import RankSocket
from cluster.router.rendezvous import Rendezvous
from cluster.router.returning import Returning
from workers.config import RunnerConfig
from workers.layout import ParallelLayout
from workers.shard import ShardConfig
from workers.step import (
    FromRank,
    PlacementUpdate,
    RankFailed,
    RankLoading,
    RankPulse,
    RankReady,
    Shutdown,
    StepPlan,
    StepResult,
    WakeUp,
    encode,
)

log = logging.getLogger(__name__)

OnProgress = Callable[[RankLoading], None]
Survivors = Mapping[int, RankHandle]
"""Ranks of a group that was lost, which have their weights still."""


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
    """One start, then steps, then one end. Not usable again: a lost group is replaced by a new one."""

    async def start(self) -> GroupInfo:
        """Raises RankLost (with the rank's own words) when a rank fails or is late; everything is stopped by then."""

    def place(self, update: PlacementUpdate) -> None:
        """Tell every rank where experts lie from the next step on. Never waits; a loss shows in `receive`."""

    @property
    def silence_s(self) -> float:
        """Since the rank that is silent for longest gave a sign of life."""

    async def dissolve(self) -> Survivors:
        """After a loss: end what is lost, and let go of the other ranks. Bounded."""

    async def stop(self) -> None:
        """End all ranks but those that were let go. Bounded; may be called again."""


@dataclass(frozen=True, kw_only=True)
class GroupBounds:
    """How long a group may take for what."""

    start_timeout_s: float = 600.0
    step_timeout_s: float = 60.0
    pulse_timeout_s: float = 15.0
    """A rank that gives no sign of life for so long, in a step or idle, is lost. Pulses come every second."""
    wake_timeout_s: float = 3.0
    """Ranks that were late together, and were woken, answer within so long, but for the one that hangs."""
    stop_timeout_s: float = 5.0
    """After Shutdown; then SIGTERM, then SIGKILL."""


class RankGroup:
    """Ranks that a launcher started, on a socket."""

    def __init__(
        self,
        launcher: Launcher,
        runners: Sequence[RunnerConfig],
        bounds: GroupBounds,
        on_progress: OnProgress,
        survivors: Survivors | None = None,
    ) -> None:
        """`survivors`: ranks that need not load; the others are launched."""
        self._launcher = launcher
        self._runners = runners
        self._bounds = bounds
        self._on_progress = on_progress
        self._layout = runners[0].layout
        self._gather = StepGather(self._layout)
        self._casualties = Casualties()
        self._pulses = Pulses(self._layout)
        self._handles: dict[int, RankHandle] = dict(survivors or {})
        self._returning = Returning(self._handles)
        self._watches: dict[int, asyncio.Task[None]] = {}
        self._ready: dict[int, RankReady] = {}
        self._results: deque[list[StepResult]] = deque()
        self._changed: asyncio.Future[None] | None = None
        self._lost: RankLost | None = None
        self._roll_call: RollCall | None = None
        self._hanging: list[int] = []
        """Ranks that could not be woken, and cannot join another group."""
        self._deadline: asyncio.TimerHandle | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._listener: asyncio.Task[None] | None = None
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
            self._listener = asyncio.create_task(self._listen(), name="listen to pulses")
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
            await self._bring_up(runner.rank, self._shard_config(runner, socket.endpoint))
        if self._rendezvous is not None:
            await self._rendezvous.open()
        return socket

    async def _bring_up(self, rank: int, config: ShardConfig) -> None:
        if rank in self._handles:
            await self._handles[rank].restart(config)
        else:
            self._handles[rank] = await self._launcher.launch(config)
        watch = self._watch(self._handles[rank], config)
        self._watches[rank] = asyncio.create_task(watch, name=f"watch rank {rank}")

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
        return RankLost(late_start(late, self._bounds.start_timeout_s), rank=late[0], cause=RankLossCause.LATE)

    @property
    def silence_s(self) -> float:
        return self._pulses.silence_s(asyncio.get_running_loop().time())

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
        if (lost := self._lost) is not None:
            raise RankLost(str(lost), rank=lost.rank, was_killed=lost.was_killed, cause=lost.cause)
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
            self._set_timer(self._bounds.step_timeout_s, self._on_deadline)

    def _set_timer(self, timeout_s: float, then: Callable[[], None]) -> None:
        """After so long and a moment: where this process was stopped itself, what ranks have sent is still unread."""
        self._deadline = asyncio.get_running_loop().call_later(timeout_s, self._wait_a_moment, then)

    def _wait_a_moment(self, then: Callable[[], None]) -> None:
        self._deadline = asyncio.get_running_loop().call_later(self._launcher.settle_s, then)

    # Events

    def _on_message(self, message: FromRank) -> None:
        self._returning.heard(message.rank)
        match message:
            case StepResult() | RankFailed() if self._roll_call is not None:
                self._roll_call.heard(message.rank)
                if isinstance(message, RankFailed):
                    log.warning("rank %d failed when it was woken: %s", message.rank, message.message)
            case StepResult():
                self._on_result(message)
            case RankLoading():
                self._on_progress(message)
            case RankPulse():
                self._pulses.heard(message, asyncio.get_running_loop().time())
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
        loop, late = asyncio.get_running_loop(), self._gather.late_ranks
        suspects = self._pulses.suspects(late, loop.time())
        if len(suspects) == 1:
            return self._lose_late(suspects[0], late)
        assert self._socket is not None, "a step was sent"
        log.warning("%s late, and nothing tells who of them keeps the others waiting: all are woken", ranks_were(late))
        self._roll_call = RollCall(late, suspects)
        for rank in late:
            self._socket.send_to_pulse(rank, encode(WakeUp()))
        self._set_timer(self._bounds.wake_timeout_s, partial(self._end_roll_call, self._roll_call, late))

    def _end_roll_call(self, roll_call: RollCall, late: list[int]) -> None:
        self._hanging = roll_call.hanging
        self._lose_late(roll_call.blamed, late)

    def _lose_late(self, rank: int, late: list[int]) -> None:
        self._lose(RankLost(lateness(rank, late, self._bounds.step_timeout_s), rank=rank, cause=RankLossCause.LATE))

    async def _listen(self) -> None:
        """Ranks tell that they live, whether they have work or not."""
        loop, timeout_s = asyncio.get_running_loop(), self._bounds.pulse_timeout_s
        rank: int | None = None
        while rank is None:
            began_s = loop.time()
            await asyncio.sleep(timeout_s / 4)
            # Where this process was stopped itself, what the ranks have sent meanwhile is still unread.
            if loop.time() - began_s < timeout_s / 2:
                rank = self._pulses.silent(timeout_s, loop.time())
        message = f"rank {rank} was not heard of for {timeout_s:g} s: its process is stopped, or its machine is gone"
        self._lose(RankLost(message, rank=rank, was_killed=True, cause=RankLossCause.SILENT))

    async def _watch(self, handle: RankHandle, config: ShardConfig) -> None:
        end = await self._returning.end_of(handle, partial(self._launcher.launch, config), self._handles)
        if self._roll_call is not None:
            self._roll_call.heard(handle.rank)
        elif not self._stopping:
            self._casualties.ended(handle.rank, end)
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

    # End

    async def dissolve(self) -> Survivors:
        """Kill what is lost or hangs, so that nobody waits for it, and let go of those that were ready and live."""
        self._begin_to_stop()
        ended = [rank for rank, watch in self._watches.items() if watch.done()]
        gone = {*ended, *self._hanging, *([self._lost.rank] if self._lost else [])}
        survivors = {rank: handle for rank, handle in self._handles.items() if rank in self._ready and rank not in gone}
        for rank in survivors:
            del self._handles[rank]
            self._watches[rank].cancel()
        await self.stop()
        return survivors

    async def stop(self) -> None:
        self._begin_to_stop()
        try:
            await self._end_ranks()
        finally:
            for watch in self._watches.values():
                watch.cancel()
            await asyncio.gather(*self._watches.values(), return_exceptions=True)
            if self._socket is not None:
                self._socket.close()
            if self._rendezvous is not None:
                self._rendezvous.close()

    def _begin_to_stop(self) -> None:
        self._stopping = True
        self._returning.stop()
        for timer in (self._deadline, self._settling):
            if timer is not None:
                timer.cancel()
        if self._listener is not None:
            self._listener.cancel()

    async def _end_ranks(self) -> None:
        """Ask, then SIGTERM, then SIGKILL. Ranks that load or have lost a peer would not hear us ask."""
        try:
            if self._lost is None and not self._casualties.any and len(self._ready) == len(self._runners):
                self._ask_to_end()
                await self._all_ended(self._bounds.stop_timeout_s)
            for handle in self._handles.values():
                handle.terminate()
            await self._all_ended(1.0)
        finally:
            for handle in self._handles.values():
                handle.kill()
        await self._all_ended(self._bounds.stop_timeout_s)

    def _ask_to_end(self) -> None:
        if self._socket is not None:
            for rank in self._ready:
                self._socket.send(rank, encode(Shutdown()))

    async def _all_ended(self, timeout_s: float) -> None:
        if watches := [self._watches[rank] for rank in self._handles if rank in self._watches]:
            await asyncio.wait(watches, timeout=timeout_s)
