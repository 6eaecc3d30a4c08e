"""Connections that delay, and break: each direction first in, first out, as TCP has it.

What is on the way when a connection breaks is lost. Each end learns of the break in its own time, and what it sends
until then goes nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.simulation.world import World

LONGEST_DELAY_S = 0.004
LONGEST_STALL_S = 0.080
LONGEST_DETECTION_S = 0.030


class End:
    """One end of a connection: sends to the other, and is told what comes, and of the break."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.on_message: Callable[[Any], object] = lambda _message: None
        self.on_broken: Callable[[], object] = lambda: None
        self.is_open = True
        self._world = world
        self._other: End | None = None
        self._line: Connection | None = None
        self._last_arrival_s = 0.0

    def send(self, message: Any) -> None:
        """Goes nowhere once the connection is broken."""
        line, world = self._line, self._world
        assert line is not None
        if line.is_broken:
            return
        arrival_s = max(self._last_arrival_s, world.now_s + line.delay_s())
        self._last_arrival_s = arrival_s
        world.at(arrival_s, lambda: self._arrive(message))

    def close(self) -> None:
        """Leave: this end hears nothing more, the other one of the break."""
        self.is_open = False
        assert self._line is not None
        self._line.break_()

    def _arrive(self, message: Any) -> None:
        assert self._line is not None
        assert self._other is not None
        if not self._line.is_broken and self._other.is_open:
            self._other.on_message(message)

    def _hear_of_break(self) -> None:
        if self.is_open:
            self.is_open = False
            self.on_broken()


class Connection:
    """Two ends."""

    def __init__(self, world: World, first: str, second: str) -> None:
        self.is_broken = False
        self.first, self.second = End(world, first), End(world, second)
        self.first._other, self.second._other = self.second, self.first
        self.first._line = self.second._line = self
        self._world = world
        self._stalled_until_s = 0.0

    def delay_s(self) -> float:
        """Of the next message."""
        world = self._world
        return max(0.0, self._stalled_until_s - world.now_s) + world.random.random() * LONGEST_DELAY_S

    def stall(self) -> None:
        """For a while nothing gets through; nothing is lost."""
        self._stalled_until_s = self._world.now_s + self._world.random.random() * LONGEST_STALL_S

    def break_(self) -> None:
        if self.is_broken:
            return
        self.is_broken = True
        for end in (self.first, self.second):
            self._world.after(self._world.random.random() * LONGEST_DETECTION_S, end._hear_of_break)
