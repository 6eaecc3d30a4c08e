"""SIGINT and SIGTERM of the `mull` command: taken when it is safe, never in the middle of something."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """The first signal is remembered until `check` or `wait` asks for it; a second raises KeyboardInterrupt at once.

    Inside `at_once` the first one raises too. To interrupt Ray while it starts would leave its processes behind.
    """

    def __init__(self) -> None:
        self._received = False
        self._raises = False
        self._read_fd, self._write_fd = os.pipe()
        self.install()

    def install(self) -> None:
        """Take the signals."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """For work that takes the signals for itself, as ray.init does: one that comes meanwhile comes to us after it.

        It must start no process, which would hold them back for ever.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            yield
        finally:
            self.install()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if self._raises or self._received:
            raise KeyboardInterrupt
        self._received = True
        os.write(self._write_fd, b"!")

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self._received:
            raise KeyboardInterrupt

    def wait(self, *, every_s: float, check: Callable[[], None]) -> None:
        """Return at the first signal; until then call `check` every so often, which may raise."""
        while not select.select([self._read_fd], [], [], every_s)[0]:
            check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that may be cut off anywhere."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False
