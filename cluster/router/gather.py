"""Who has answered which step, and who is to blame when a group falls apart. Of ranks that are late
`late.py` finds the one that the others wait for.

Hop 6, the Router's side, pure: events go in, facts come out; no clock, socket or await. `shards.py` drives it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from cluster.errors import EngineError, RankLossCause, RankLost
from workers.layout import ParallelLayout
from workers.step import StepResult


@dataclass(frozen=True)
class RankEnd:
    """How a rank's process or actor ended."""

    how: str
    """Reads on from 'rank 1 …'."""
    was_killed: bool
    """From outside, as far as one can see."""


@dataclass(slots=True)
class _OpenStep:
    step: int
    missing: set[int]
    answers: dict[int, StepResult] = field(default_factory=dict)


class StepGather:
    """A step is complete when every rank has answered it. Steps complete in the order in which they were sent."""

    def __init__(self, layout: ParallelLayout) -> None:
        self._world = layout.world_size
        self._open: deque[_OpenStep] = deque()

    @property
    def has_open_steps(self) -> bool:
        return bool(self._open)

    @property
    def late_ranks(self) -> list[int]:
        """The ranks that the oldest step waits for."""
        return sorted(self._open[0].missing) if self._open else []

    def sent(self, step: int) -> None:
        """The plans of a step have gone out to every rank."""
        self._open.append(_OpenStep(step, set(range(self._world))))

    def answered(self, result: StepResult) -> list[StepResult] | None:
        """Take one rank's answer. Gives all ranks' when this was the last one its step waited for, in rank order.

        Raises EngineError when the rank answered anything but its oldest open step: its order is broken.
        """
        expected = next((entry for entry in self._open if result.rank in entry.missing), None)
        if expected is None or expected.step != result.step:
            wanted = "nothing" if expected is None else f"step {expected.step}"
            raise EngineError(f"rank {result.rank} answered step {result.step}, expected {wanted}")
        expected.missing.remove(result.rank)
        expected.answers[result.rank] = result
        if expected.missing:
            return None
        # Ranks answer in order, so only the oldest step can have become complete.
        answers = self._open.popleft().answers
        return [answers[rank] for rank in range(self._world)]


class Casualties:
    """What is known about the ranks that are gone; finds the one that took the others with it.

    A rank that fails by itself says so before it ends. One that vanished without a word was killed or crashed, and the
    errors of the others (a broken collective) are then its consequence: so silence is blamed before words, and earlier
    before later.
    """

    def __init__(self) -> None:
        self._said: dict[int, str] = {}
        self._ended: dict[int, RankEnd] = {}
        self._unreachable: list[int] = []

    def failed(self, rank: int, message: str) -> None:
        """A rank told us its error."""
        self._said.setdefault(rank, message)

    def ended(self, rank: int, end: RankEnd) -> None:
        """A rank's process or actor is no more."""
        self._ended.setdefault(rank, end)

    def unreachable(self, rank: int) -> None:
        """A plan could not be sent to it. Mostly it has ended, and how it did will come."""
        self._unreachable.append(rank)

    @property
    def any(self) -> bool:
        return bool(self._said or self._ended or self._unreachable)

    def verdict(self) -> RankLost:
        """The error to raise; call it only when there is a casualty."""
        for rank, end in self._ended.items():
            if rank not in self._said:
                cause = RankLossCause.EXITED
                return RankLost(f"rank {rank} {end.how}", rank=rank, was_killed=end.was_killed, cause=cause)
        for rank, message in self._said.items():
            return RankLost(f"rank {rank} failed: {message}", rank=rank)
        rank = self._unreachable[0]
        return RankLost(f"rank {rank} cannot be reached", rank=rank, cause=RankLossCause.EXITED)
