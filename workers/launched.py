"""A step that a rank has taken on: on a GPU it is in the device's queue, and the next one may be put behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from workers.step import StepResult


class Launched(Protocol):
    """A step that was taken on."""

    def is_done(self) -> bool:
        """Whether `result` would not wait."""

    def result(self) -> StepResult:
        """Waits for the step. Steps are asked in the order in which they were launched."""


@dataclass(frozen=True)
class Done:
    """A step that took its time while it was launched."""

    step_result: StepResult

    def is_done(self) -> bool:
        return True

    def result(self) -> StepResult:
        return self.step_result
