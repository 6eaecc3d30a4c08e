"""When to try a call again, and how long to wait before. No clock and no sleep of its own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from mull.client.errors import CallFailed

_CODES = frozenset({grpc.StatusCode.UNAVAILABLE})
_RESUMPTION_CODES = _CODES | {grpc.StatusCode.RESOURCE_EXHAUSTED}
"""A server that cannot take a stream in now may do so soon; one whose reader was too slow says so after an event."""


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Calls that end UNAVAILABLE are tried again, after growing pauses with jitter."""

    attempts: int = 6
    """Before the first event; at most, the first included."""
    resumptions: int = 12
    """Of a stream that was cut, since its last event: it goes on where it was."""
    first_pause_s: float = 0.2
    longest_pause_s: float = 5.0


class Retries:
    """The attempts of one call."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float | None,
        *,
        now: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """`timeout_s` bounds all attempts and pauses together; None: no bound."""
        self._policy = policy
        self._now = now
        self._jitter = jitter
        self._deadline_s = None if timeout_s is None else now() + timeout_s
        self._start_s = now()
        self._num_failed = 0
        self._has_begun = False
        self._is_resuming = False

    @property
    def timeout_s(self) -> float | None:
        """What is left for the next attempt, in seconds."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - self._now())

    @property
    def elapsed_s(self) -> float:
        """Since the first attempt."""
        return self._now() - self._start_s

    def progressed(self) -> None:
        """An event has come."""
        self._num_failed, self._has_begun, self._is_resuming = 0, True, False

    def pause_after(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next attempt. Raises CallFailed where there is none."""
        self._num_failed += 1
        policy = self._policy
        longest_s = min(policy.longest_pause_s, policy.first_pause_s * 2 ** (self._num_failed - 1))
        pause_s = self._jitter(longest_s / 2, longest_s)
        left_s = self.timeout_s
        is_late = left_s is not None and left_s <= pause_s
        is_last = self._num_failed > policy.resumptions if self._has_begun else self._num_failed >= policy.attempts
        codes = _RESUMPTION_CODES if self._is_resuming else _CODES
        if error.code() not in codes or is_last or is_late:
            raise CallFailed.of(error) from error
        self._is_resuming = self._has_begun
        return pause_s
