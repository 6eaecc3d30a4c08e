"""Ends a task from outside with an error of its own, wherever it waits: in a read, or in a write that nobody takes.

Like asyncio.timeout, but the reason may be any. Also works around the `yield` of an asynchronous
generator that its consumer iterates and closes (`contextlib.aclosing`) in one task: the error then comes out of the
closing.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from cluster.errors import DeadlinePassed


class Interruption:
    """Inside, `interrupt` ends the task with an error; so does the deadline."""

    def __init__(self, timeout_s: float | None = None) -> None:
        self._timeout_s = timeout_s
        self._task: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None

    def interrupt(self, error: Exception) -> None:
        """The first error counts."""
        if self._error is None and self._task is not None:
            self._error = error
            self._task.cancel()

    async def __aenter__(self) -> Interruption:
        self._task = asyncio.current_task()
        if self._timeout_s is not None:
            self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._on_deadline)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        assert task is not None
        if self._timer is not None:
            self._timer.cancel()
        if self._error is None:
            return
        is_delivered = isinstance(error, asyncio.CancelledError)
        if not is_delivered:
            # The cancellation may still be on its way, and must not hit what comes after.
            is_delivered = await _is_cancelled()
        if task.uncancel() == 0:
            raise self._error from None
        if is_delivered and not isinstance(error, asyncio.CancelledError):
            # Somebody else has cancelled the task, too.
            raise asyncio.CancelledError

    def _on_deadline(self) -> None:
        self.interrupt(
            DeadlinePassed(f"timeout_seconds {self._timeout_s:g} have passed; allow more, or lower max_tokens")
        )


async def _is_cancelled() -> bool:
    """Take a cancellation that has been asked for and not delivered."""
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        return True
    return False
