"""ShardGroup: what the ranks of one copy are to the Router, whoever runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.router.launchers import RankHandle
from workers.layout import ParallelLayout
from workers.step import PlacementUpdate, RankLoading, RankReady, StepPlan, StepResult

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
