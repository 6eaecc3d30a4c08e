"""Whether a lost group is started again: the engine's states and the rules between them.

Pure: events in, decisions out; `engine.py` acts on them. No clock: a decision says how long to wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class EngineState(Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    """Out of tries; only a new Router helps."""
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How often a group may fail to come back before the Router gives up."""

    max_restarts: int = 3
    first_backoff_s: float = 0.5
    """Before the second try; the first one comes at once."""
    backoff_factor: float = 2.0


class Supervisor:
    """Counts restarts since the last step that worked."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._restarts = 0
        self.state = EngineState.STARTING
        self.reason = "the ranks are loading"

    def started(self) -> None:
        self.state = EngineState.READY
        self.reason = ""

    def stepped(self) -> None:
        """A step came back: what was lost before is over."""
        self._restarts = 0

    def lost(self, reason: str) -> float | None:
        """The group could not start, or fell apart. Seconds to wait before the next start; None: give up.

        The very first start is not tried again: what keeps it from loading (a file, a layout) will do so again.
        """
        if self.state is EngineState.STARTING or self._restarts >= self._policy.max_restarts:
            self.state = EngineState.FAILED
            self.reason = reason
            return None
        wait_s = 0.0
        if self._restarts:
            wait_s = self._policy.first_backoff_s * self._policy.backoff_factor ** (self._restarts - 1)
        self._restarts += 1
        self.state = EngineState.RESTARTING
        self.reason = f"{reason}; starting its group again (try {self._restarts} of {self._policy.max_restarts})"
        return wait_s

    def failed(self, reason: str) -> None:
        """A group could not even be made or cleared away. An engine that was stopped stays stopped."""
        if self.state is not EngineState.STOPPED:
            self.state = EngineState.FAILED
            self.reason = reason

    def stopped(self) -> None:
        self.state = EngineState.STOPPED
        self.reason = "the Router is stopping"
