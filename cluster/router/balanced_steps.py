"""The steps of a group whose experts move now and then: what the balancer decides, done beside the step loop.

Hop 6. Loads are asked for in plans and found in results; a new placement is computed in a thread, since it takes up to
half a second for a large model, and sent between two steps. Nobody waits: streams go on meanwhile.
"""

from __future__ import annotations

import asyncio
import logging

from cluster.router.balancer import ExpertBalancer, LoadReport, Placement
from cluster.router.shard_group import ShardGroup
from workers.step import StepPlan, StepResult

log = logging.getLogger(__name__)


class BalancedSteps:
    """`send` and `receive` of a ShardGroup. `stop` it before the group."""

    def __init__(self, group: ShardGroup, balancer: ExpertBalancer) -> None:
        self._group = group
        self._balancer = balancer
        self._planning: asyncio.Task[Placement | None] | None = None

    def send(self, plans: list[StepPlan]) -> None:
        if self._planning is not None and self._planning.done():
            placement, self._planning = self._planning.result(), None
            self._move(placement)
        self._group.send(self._balancer.stamp(plans))

    async def receive(self) -> list[StepResult]:
        results = await self._group.receive()
        if (report := self._balancer.take(results)) is not None:
            self._planning = asyncio.create_task(self._plan(report), name="expert placement")
        return results

    async def stop(self) -> None:
        """Waits for a placement that is being computed: threads cannot be cancelled."""
        if self._planning is not None:
            await asyncio.gather(self._planning, return_exceptions=True)

    async def _plan(self, report: LoadReport) -> Placement | None:
        return await asyncio.to_thread(self._balancer.plan, report)

    def _move(self, placement: Placement | None) -> None:
        update = self._balancer.decide(placement)
        if update is not None:
            log.info("placement %d of experts: the imbalance was %.2f", update.version, self._balancer.imbalance)
            self._group.place(update)
