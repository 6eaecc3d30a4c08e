"""Virtual time: what happens when, in an order that a seed alone decides."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from random import Random
from typing import Any


class Timer:
    """Something that will happen, unless it is cancelled."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], object]) -> None:
        self.action: Callable[[], object] | None = action

    def cancel(self) -> None:
        self.action = None


class World:
    """The clock, the dice, and the record of what happened."""

    def __init__(self, seed: int, *, keep_trace: bool = False) -> None:
        self.now_s = 0.0
        self.random = Random(seed)
        self.trace: list[str] | None = [] if keep_trace else None
        self.num_events = 0
        self._queue: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()

    def after(self, delay_s: float, action: Callable[[], object]) -> Timer:
        """Let `action` happen in so many seconds."""
        return self.at(self.now_s + delay_s, action)

    def at(self, time_s: float, action: Callable[[], object]) -> Timer:
        """Let `action` happen at this time; of two at the same time, the one asked for first comes first."""
        timer = Timer(action)
        heapq.heappush(self._queue, (time_s, next(self._numbers), timer))
        return timer

    def between(self, low: float, high: float) -> float:
        """A random number of this range."""
        return low + (high - low) * self.random.random()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def tell(self, text: str, *values: Any) -> None:
        """A line of the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.now_s * 1000:9.3f} ms  {text % values if values else text}")

    def run(self, *, until_s: float, is_over: Callable[[], bool]) -> bool:
        """Let time pass until `is_over`; False: it was not by `until_s`, or nothing was left to happen."""
        while self._queue:
            at_s, _, timer = self._queue[0]
            if at_s > until_s:
                return False
            heapq.heappop(self._queue)
            if timer.action is None:
                continue
            self.now_s = at_s
            self.num_events += 1
            timer.action()
            if is_over():
                return True
        return False
