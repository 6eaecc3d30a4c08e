"""The plans whose results are not back, in the order in which they were sent: results come in the same one.

Hop 5 and 10, a part of the scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from cluster.errors import EngineError
from cluster.router.sequence import Sequence
from cluster.router.step_builder import StepInFlight
from workers.step import StepResult


class StepsInFlight:
    """Of one attention group."""

    def __init__(self) -> None:
        self._steps: deque[StepInFlight] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[StepInFlight]:
        """Oldest first."""
        return iter(self._steps)

    @property
    def oldest(self) -> StepInFlight:
        """The one whose result comes next."""
        return self._steps[0]

    @property
    def newest(self) -> StepInFlight:
        """The one that was sent last."""
        return self._steps[-1]

    @property
    def are_computing(self) -> bool:
        """One of them computes something."""
        return any(step.computed for step in self._steps)

    @property
    def are_drafting(self) -> bool:
        """One of them has drafts."""
        return any(step.drafted for step in self._steps)

    @property
    def computed(self) -> list[Sequence]:
        """The unfinished sequences of whom they compute a token."""
        computed = {id(seq): seq for step in self._steps for seq in step.computed}
        return [seq for seq in computed.values() if not seq.has_ended]

    @property
    def admitted(self) -> Iterator[tuple[Sequence, int]]:
        """Sequences that they gave their first slot, and their cached prompt tokens."""
        return (entry for step in self._steps for entry in step.admitted)

    def add(self, step: StepInFlight) -> None:
        """It was sent."""
        self._steps.append(step)

    def passed(self, num_steps: int, running: list[Sequence]) -> None:
        """So many results were taken, and behind each a plan was sent with a decode of everyone who runs.

        For the planner, which knows many steps at once.
        """
        steps = self._steps
        num_new = min(num_steps, len(steps))
        first = steps[-1].step + 1 + num_steps - num_new
        for step in range(first, first + num_new):
            steps.popleft()
            steps.append(StepInFlight(step, running.copy(), [], [], running.copy(), []))

    def drop_newest(self) -> None:
        """It would not be made any more: for the planner, which knows it before it runs."""
        self._steps.pop()

    def clear(self) -> None:
        """None of them has a result any more."""
        self._steps.clear()

    def take(self, result: StepResult) -> StepInFlight:
        """The oldest, which this is the result of. Raises EngineError where it is not; nothing is taken then."""
        if not self._steps or self._steps[0].step != result.step:
            expected = self._steps[0].step if self._steps else "none"
            raise EngineError(f"rank {result.rank} answered step {result.step}, expected {expected}; restart the group")
        done = self._steps[0]
        if len(done.sampled) != len(result.token_ids):
            raise EngineError(
                f"rank {result.rank} gave {len(result.token_ids)} tokens for step {result.step}, "
                f"expected {len(done.sampled)}; restart the group"
            )
        if len(done.drafted) != len(result.accepted_ids):
            raise EngineError(
                f"rank {result.rank} told of {len(result.accepted_ids)} drafts for step {result.step}, "
                f"expected {len(done.drafted)}; restart the group"
            )
        return self._steps.popleft()
