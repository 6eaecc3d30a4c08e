"""RequestWatch: who is told how requests fare at a Router's engine: what measures them, and what traces them.

Between hops 5 and 10. Times are of the monotonic clock, in seconds; nothing here may wait.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

from cluster.router.sequence import SequenceRequest, SequenceUpdate


class RequestWatch(Protocol):
    """Told by the step loop."""

    def on_added(self, request: SequenceRequest, now_s: float) -> None:
        """A request was taken."""
        ...

    def on_updates(self, updates: Sequence[SequenceUpdate], sent_s: float, now_s: float) -> None:
        """What a step had, which was sent at `sent_s`."""
        ...

    def on_ended(self, key: Hashable, now_s: float) -> None:
        """Its gateway wants no more of a request: it was cancelled, or its gateway has gone."""
        ...

    def on_lost(self, last_step_s: float) -> None:
        """The ranks were lost: what they computed stands still."""
        ...

    def clear(self) -> None:
        """The engine has ended, stopped or lost for good, and all requests with it."""
        ...
