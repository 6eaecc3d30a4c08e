"""One copy at work: its ranks and their experts, and the loop that moves plans and results.

Hops 5, 6 and 10. Drives `engine_core.py`, which decides. Knows keys and tokens, not gateways or gRPC.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import NoReturn

from cluster.errors import EngineError, MullError
from cluster.metrics.request_times import RequestTimes
from cluster.metrics.steps import StepMetrics
from cluster.router.balanced_steps import BalancedSteps
from cluster.router.balancer import ExpertBalancer
from cluster.router.engine_core import EngineCore, Pool
from cluster.router.host_tier import host_words, plan_host
from cluster.router.request_watch import RequestWatch
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import SequenceRequest, SequenceUpdate
from cluster.router.shard_group import GroupInfo, OnProgress, ShardGroup, Steps, Survivors
from cluster.router.supervision import RestartPolicy
from workers.layout import ParallelLayout
from workers.step import RankLoading, StepResult

log = logging.getLogger(__name__)

GroupFactory = Callable[[OnProgress, Survivors], ShardGroup]
BalancerFactory = Callable[[GroupInfo], ExpertBalancer | None]
"""None: there is nothing to balance."""


def no_balancer(info: GroupInfo) -> None:
    """For a model without experts, or with all of them in one place."""
    del info


class Engine:
    """Runs from `start` to `stop`.

    `on_updates` gets what there is for the sequences, `on_ended` why all live ones have ended: it could not go on.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        make_group: GroupFactory,
        *,
        on_updates: Callable[[list[SequenceUpdate]], None],
        on_ended: Callable[[str], None],
        enable_prefix_cache: bool = True,
        restarts: RestartPolicy | None = None,
        make_balancer: BalancerFactory = no_balancer,
        watches: Sequence[RequestWatch] = (),
    ) -> None:
        """`watches` are told how requests fare."""
        self.core = EngineCore(config, restarts or RestartPolicy(), enable_prefix_cache=enable_prefix_cache)
        self._make_group = make_group
        self._on_updates = on_updates
        self._on_ended = on_ended
        self._make_balancer = make_balancer
        self.balancer: ExpertBalancer | None = None
        """Where the experts of the present ranks lie; None: nothing to balance, or no ranks."""
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._alive_s = time.monotonic()
        self._group: ShardGroup | None = None
        self.info: GroupInfo | None = None
        """The group that takes plans now."""
        self.layout: ParallelLayout | None = None
        """Of the newest group that took plans; None before the first one."""
        self.loading: dict[int, RankLoading] = {}
        """The last progress of each rank of the newest group."""
        self.steps = StepMetrics()
        self.times = RequestTimes()
        self._watches: tuple[RequestWatch, ...] = (self.times, *watches)
        self._sent_s: deque[float] = deque()
        """When each plan in flight was sent."""

    @property
    def heartbeat_age_s(self) -> float:
        """Since a step came; where nothing is to do, since the rank that is silent for longest gave a sign of life."""
        if self._group is not None and self.core.num_in_flight == 0:
            return self._group.silence_s
        return time.monotonic() - self._alive_s

    def start(self) -> None:
        """Begin to load; `wait_settled` says when that is over."""
        self._task = asyncio.create_task(self._supervise(), name="engine")

    async def wait_settled(self) -> None:
        """Until the first start has succeeded or failed; `core.state` says which."""
        await self._settled.wait()

    async def wait_ended(self) -> None:
        """Until it has failed for good or was stopped."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def stop(self) -> None:
        """Stop the ranks. Live sequences get no more updates."""
        self.core.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def add(self, request: SequenceRequest) -> None:
        """Raises NotReady, Overloaded or a RequestError."""
        self.core.add(request)
        for watch in self._watches:
            watch.on_added(request, time.monotonic())
        self._wake.set()

    def cancel(self, key: Hashable) -> SequenceUpdate | None:
        """Its blocks are free on return. The last update of the sequence, or None where it is not live."""
        update = self.core.cancel(key)
        for watch in self._watches:
            watch.on_ended(key, time.monotonic())
        self._wake.set()
        return update

    def set_budget(self, key: Hashable, thinking_budget: int) -> None:
        """Thinking tokens at most from now on; nothing happens where the sequence is not live."""
        self.core.set_budget(key, thinking_budget)
        self._wake.set()

    async def _supervise(self) -> None:
        """Start a group, step it; when it is lost, start the next one with who is left of it, as the core decides."""
        try:
            wait_s: float | None = 0.0
            survivors: Survivors = {}
            while wait_s is not None:
                await asyncio.sleep(wait_s)
                self.loading.clear()
                group = self._make_group(self._on_progress, survivors)
                try:
                    wait_s = self._lose(await self._run(group))
                    survivors = await group.dissolve() if wait_s is not None else {}
                finally:
                    await group.stop()
        except Exception as error:  # nobody waits for this task: what is not told here is never heard of
            log.exception("the engine cannot go on")
            self.core.fail(error)
            self._on_ended(self.core.reason)
        finally:
            self.core.close()
            self._tell_all_ended()
            self._forget_ranks()
            self._settled.set()

    async def _run(self, group: ShardGroup) -> Exception:
        """One group from its start to its loss; returns why it was lost."""
        try:
            self._open(group, await group.start())
            if self.balancer is None:
                await self._step_forever(group)
            steps = BalancedSteps(group, self.balancer)
            try:
                await self._step_forever(steps)
            finally:
                await steps.stop()
        except MullError as error:
            return error
        except Exception as error:  # the boundary of the engine: sequences must be told whatever it was
            log.exception("the engine failed")
            return error

    def _open(self, group: ShardGroup, info: GroupInfo) -> None:
        memories = [rank.host_memory for rank in info.ranks]
        host = plan_host(memories, info.block_size)
        pool = Pool(num_groups=info.layout.dp, num_blocks=info.num_blocks, block_size=info.block_size, host=host)
        self.core.on_started(pool)
        self.balancer = self._make_balancer(info)
        self._group, self.info, self.layout = group, info, info.layout
        self._alive_s = time.monotonic()
        self._settled.set()
        blocks = "%d ranks in %d groups, each with %d blocks of %d tokens"
        if (words := host_words(memories, host)) is not None:
            log.info(words)
        if (limit := self.core.context_limit) is not None and limit < self.core.max_model_len:
            log.warning(
                "the KV pool holds %d tokens, the context has %d: raise engine.kv_memory_bytes for longer sequences",
                *(limit, self.core.max_model_len),
            )
        log.info("engine ready: " + blocks, len(info.ranks), pool.num_groups, info.num_blocks, info.block_size)

    def _lose(self, error: Exception) -> float | None:
        """Seconds to wait before the next start. Who must end is told before the group's remains are cleared away."""
        loss = self.core.on_lost(error)
        log.error("engine %s: %s", self.core.state.value, self.core.reason)
        self._forget_ranks()
        for watch in self._watches:
            watch.on_updates(loss.given_up, self._alive_s, time.monotonic())
            watch.on_lost(self._alive_s)
        if loss.wait_s is None:
            self._tell_all_ended()
            self._on_ended(self.core.reason)
        self._on_updates(loss.given_up)
        return loss.wait_s

    def _tell_all_ended(self) -> None:
        for watch in self._watches:
            watch.clear()

    def _forget_ranks(self) -> None:
        self.balancer = None
        self._group = self.info = None
        self._sent_s.clear()

    def _on_progress(self, progress: RankLoading) -> None:
        self.loading[progress.rank] = progress

    async def _step_forever(self, group: Steps) -> NoReturn:
        core = self.core
        while True:
            self._send_plans(group)
            if core.num_in_flight == 0:
                await self._wait_for_work(group)
                continue
            self._take_results(await group.receive())

    def _send_plans(self, group: Steps) -> None:
        """As many as may be under way."""
        begun_s = time.monotonic()
        while (plans := self.core.next_plans()) is not None:
            planned_s = time.monotonic()
            group.send(plans)
            self._sent_s.append(planned_s)
            sent_s = time.monotonic()
            self.steps.on_sent(plans, schedule_s=planned_s - begun_s, send_s=sent_s - planned_s)
            begun_s = sent_s

    def _take_results(self, results: list[StepResult]) -> None:
        self._alive_s = time.monotonic()
        updates = self.core.on_results(results)
        sent_s = self._sent_s.popleft()
        for watch in self._watches:
            watch.on_updates(updates, sent_s, self._alive_s)
        self._on_updates(updates)
        self.steps.on_results(results, collect_s=time.monotonic() - self._alive_s)

    async def _wait_for_work(self, group: Steps) -> None:
        """Idle: until something was submitted or cancelled. Raises RankLost where the group is lost meanwhile."""
        lost = asyncio.ensure_future(group.receive())
        work = asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait({lost, work}, return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                lost.result()
                raise EngineError("a result came while no plan was out")
            self._wake.clear()
        finally:
            lost.cancel()
            work.cancel()
            await asyncio.gather(lost, work, return_exceptions=True)
