"""What the simulation asks of a cost model: how long a step takes, and what of it grows with the context."""

from __future__ import annotations

from typing import Protocol

from cluster.planner.roofline import StepTime
from cluster.planner.step_shape import GroupShape, StepShape


class CostModel(Protocol):
    """The ranks of one copy, as far as time goes."""

    def step(self, shape: StepShape) -> StepTime:
        """The parts of a step of this shape."""

    def context_s(self, group: GroupShape) -> float:
        """What decodes of a group spend on the KV they read. Of a step, the largest of its groups counts."""

    def growth(self, group: GroupShape) -> tuple[float, int]:
        """By how much that is more with each further token of all its decodes, and for how many tokens it stays so."""
