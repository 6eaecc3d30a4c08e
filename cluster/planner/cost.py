"""What the simulation asks of a cost model: how long a step takes, and what of it grows with the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.planner.roofline import StepTime
from cluster.planner.step_shape import StepShape


class CostModel(Protocol):
    """The ranks of one copy, as far as time goes."""

    def step(self, shape: StepShape) -> StepTime:
        """The parts of a step of this shape."""

    def decode_context_s(self, contexts: Sequence[float]) -> float:
        """Of those parts, what decodes spend on the KV they read: proportional to the largest of the groups' sums."""
