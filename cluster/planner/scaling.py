"""Autoscaling in virtual time: the product's own policy says how many copies, Serve's delays say when it is done.

Serve averages what replicas say over half a minute; here they are asked when it decides. Its delays are longer.
"""

from __future__ import annotations

from types import SimpleNamespace

from cluster.planner.fleet import Fleet
from cluster.planner.operations import Operations
from cluster.planner.upsets import Operator
from cluster.router.autoscaling import KV_USED, SLOTS_USED, scale_copies


class Autoscaler:
    """Looks at the fleet every few seconds. The same answer must stand for a while before it is acted on."""

    def __init__(
        self, fleet: Fleet, operator: Operator, operations: Operations, *, least: int, most: int, slots: int
    ) -> None:
        """`least`, `most`: copies; `slots`: of one copy."""
        self._fleet, self._operator = fleet, operator
        self._least, self._most, self._slots = least, most, slots
        self._period_s = operations.serve.autoscaling_period_s
        self._upscale_s, self._downscale_s = operations.router.upscale_delay_s, operations.router.downscale_delay_s
        self._target = least
        self._direction = 0
        self._since_s = 0.0

    def start(self) -> None:
        self._fleet.at(self._fleet.now_s + self._period_s, self._look)

    def _look(self) -> None:
        now_s, target = self._fleet.now_s, self._target
        wanted = min(self._most, max(self._least, self._wanted()))
        direction = (wanted > target) - (wanted < target)
        if direction != self._direction:
            self._direction, self._since_s = direction, now_s
        delay_s = self._upscale_s if direction > 0 else self._downscale_s
        if direction and now_s - self._since_s >= delay_s:
            words = f"{target} copies become {wanted}"
            if direction > 0:
                self._operator.add_copies(wanted - target, words)
            else:
                self._operator.remove_copies(target - wanted, words)
            self._target, self._direction = wanted, 0
        self._fleet.at(now_s + self._period_s, self._look)

    def _wanted(self) -> int:
        """What the hook that Serve is given answers."""
        ready = [copy for copy in self._fleet.copies.values() if copy.is_open]
        said = {
            SLOTS_USED: {copy.name: (copy.num_running + copy.num_waiting) / self._slots for copy in ready},
            KV_USED: {copy.name: copy.kv_share for copy in ready},
        }
        wanted, _ = scale_copies(SimpleNamespace(aggregated_metrics=said, target_num_replicas=self._target))
        return wanted
