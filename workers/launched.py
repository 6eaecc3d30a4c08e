"""A step that a rank has taken on: on a GPU it is in the device's queue, and the next one may be put behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from workers.step import StepResult

BeforeWait = Callable[[], None]
"""Called by a launch that is about to wait for the device, each time: what is owed of earlier steps is sent first, as
the device is done with those before it does what is waited for."""


def owe_nothing() -> None:
    """No earlier step is under way."""


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
