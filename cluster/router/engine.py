"""One copy at work: its scheduler, its ranks and their experts, and the loop that moves plans and results.

Hops 5, 6 and 10. Knows keys and tokens, not gateways or gRPC. What happens when a rank is lost happens in `_supervise`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from typing import NoReturn

from cluster.errors import EngineError, MullError, NotReady
from cluster.router.balanced_steps import BalancedSteps
from cluster.router.balancer import ExpertBalancer
from cluster.router.blocks import BlockAllocator
from cluster.router.copy_scheduler import CopyScheduler
from cluster.router.scheduler import SchedulerConfig, SchedulerStats
from cluster.router.sequence import SequenceRequest, SequenceUpdate
from cluster.router.shards import GroupInfo, OnProgress, ShardGroup, Steps
from cluster.router.supervision import EngineState, RestartPolicy, Supervisor
from workers.step import RankLoading

log = logging.getLogger(__name__)

GroupFactory = Callable[[OnProgress], ShardGroup]
BalancerFactory = Callable[[GroupInfo], ExpertBalancer | None]
"""None: there is nothing to balance."""


def no_balancer(info: GroupInfo) -> None:
    """For a model without experts, or with all of them in one place."""
    del info


class Engine:
    """Runs from `start` to `stop`.

    `on_updates` gets what each step has for the sequences, `on_lost` why all live ones have ended.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        make_group: GroupFactory,
        *,
        on_updates: Callable[[list[SequenceUpdate]], None],
        on_lost: Callable[[str], None],
        enable_prefix_cache: bool = True,
        restarts: RestartPolicy | None = None,
        make_balancer: BalancerFactory = no_balancer,
    ) -> None:
        self._config = config
        self._make_group = make_group
        self._on_updates = on_updates
        self._on_lost = on_lost
        self._enable_prefix_cache = enable_prefix_cache
        self._supervisor = Supervisor(restarts or RestartPolicy())
        self._make_balancer = make_balancer
        self._scheduler: CopyScheduler | None = None
        self.balancer: ExpertBalancer | None = None
        """Where the experts of the present ranks lie; None: nothing to balance, or no ranks."""
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.info: GroupInfo | None = None
        """The group that takes plans now."""
        self.loading: dict[int, RankLoading] = {}
        """The last progress of each rank of the newest group."""
        self.num_steps_total = 0
        self.num_restarts_total = 0

    @property
    def state(self) -> EngineState:
        return self._supervisor.state

    @property
    def reason(self) -> str:
        """Why it is not ready; empty when it is."""
        return self._supervisor.reason

    @property
    def context_limit(self) -> int | None:
        """Longest prompt plus output that can run, in tokens: known once the KV pool is."""
        return self._scheduler.context_limit if self._scheduler else None

    @property
    def scheduler_stats(self) -> SchedulerStats | None:
        return self._scheduler.stats if self._scheduler else None

    def start(self) -> None:
        """Begin to load; `wait_settled` says when that is over."""
        self._task = asyncio.create_task(self._supervise(), name="engine")

    async def wait_settled(self) -> None:
        """Until the first start has succeeded or failed; `state` says which."""
        await self._settled.wait()

    async def wait_ended(self) -> None:
        """Until it has failed for good or was stopped."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def stop(self) -> None:
        """Stop the ranks. Live sequences get no more updates."""
        self._supervisor.stopped()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def add(self, request: SequenceRequest) -> None:
        """Raises NotReady, Overloaded or a RequestError."""
        if self._scheduler is None:
            raise NotReady(self.reason)
        self._scheduler.add(request)
        self._wake.set()

    def cancel(self, key: Hashable) -> SequenceUpdate | None:
        """Its blocks are free on return. The last update of the sequence, or None where it is not live."""
        if self._scheduler is None:
            return None
        update = self._scheduler.cancel(key)
        self._wake.set()
        return update

    def set_budget(self, key: Hashable, thinking_budget: int) -> None:
        """Thinking tokens at most from now on; nothing happens where the sequence is not live."""
        if self._scheduler is not None:
            self._scheduler.set_budget(key, thinking_budget)
            self._wake.set()

    async def _supervise(self) -> None:
        """Start a group, step it; when it is lost, tell everyone and start the next one, as the supervisor decides."""
        try:
            wait_s: float | None = 0.0
            while wait_s is not None:
                await asyncio.sleep(wait_s)
                self.loading.clear()
                group = self._make_group(self._on_progress)
                try:
                    wait_s = self._lose(await self._run(group))
                finally:
                    await group.stop()
        except Exception as error:  # nobody waits for this task: what is not told here is never heard of
            log.exception("the engine cannot go on")
            self._supervisor.failed(_fault(error))
        finally:
            self._close()
            self._settled.set()

    async def _run(self, group: ShardGroup) -> str:
        """One group from its start to its loss; returns why it was lost."""
        try:
            scheduler = self._open(await group.start())
            if self.balancer is None:
                await self._step_forever(group, scheduler)
            steps = BalancedSteps(group, self.balancer)
            try:
                await self._step_forever(steps, scheduler)
            finally:
                await steps.stop()
        except MullError as error:
            return str(error)
        except Exception as error:  # the boundary of the engine: sequences must be told whatever it was
            log.exception("the engine failed")
            return _fault(error)

    def _open(self, info: GroupInfo) -> CopyScheduler:
        cached = self._enable_prefix_cache
        pools = [BlockAllocator(info.num_blocks, info.block_size, cached) for _ in range(info.layout.dp)]
        self._scheduler = CopyScheduler(self._config, pools)
        self.balancer = self._make_balancer(info)
        self.info = info
        self._supervisor.started()
        self._settled.set()
        blocks = "%d ranks in %d groups, each with %d blocks of %d tokens"
        log.info("engine ready: " + blocks, len(info.ranks), len(pools), info.num_blocks, info.block_size)
        return self._scheduler

    def _close(self) -> None:
        self._scheduler = None
        self.balancer = None
        self.info = None

    def _lose(self, reason: str) -> float | None:
        """Sequences of the lost group end before the group's remains are cleared away."""
        wait_s = self._supervisor.lost(reason)
        log.error("engine %s: %s", self.state.value, self.reason)
        self._close()
        self.num_restarts_total += wait_s is not None
        self._on_lost(self.reason)
        return wait_s

    def _on_progress(self, progress: RankLoading) -> None:
        self.loading[progress.rank] = progress

    async def _step_forever(self, group: Steps, scheduler: CopyScheduler) -> NoReturn:
        while True:
            while (plans := scheduler.schedule()) is not None:
                group.send(plans)
            if scheduler.num_in_flight == 0:
                await self._wait_for_work(group)
                continue
            results = await group.receive()
            self.num_steps_total += 1
            self._supervisor.stepped()
            # The first rank of each group names its tokens.
            self._on_updates(scheduler.apply(results[:: len(results) // scheduler.num_groups]))

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


def _fault(error: Exception) -> str:
    if isinstance(error, MullError):
        return str(error)
    return f"a fault in the Router: {type(error).__name__}: {error}"
