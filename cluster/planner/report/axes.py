"""Axes of charts: where a value lies, and which values are written beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.planner.quantities import plain

_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
_TIME_UNITS = ((1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "d"))
_UNITS_SHOWN = 3
"""A time axis takes the largest unit of which it shows at least so many."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """`factor` turns a value into what is written: 1000 for seconds that are shown as milliseconds."""

    title: str
    high: float
    low: float = 0.0
    is_log: bool = False
    factor: float = 1.0
    ticks: tuple[float, ...] = field(default=())
    write: Callable[[float], str] = plain

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def label(self, value: float) -> str:
        return self.write(value * self.factor)


def from_zero(title: str, largest: float, *, factor: float = 1.0, num_ticks: int = 4) -> Axis:
    """From 0 to the round number that holds `largest`."""
    step = _nice_step((largest or 1.0) * factor / num_ticks) / factor
    count = max(1, math.ceil(round((largest or 1.0) / step, 9)))
    return Axis(title=title, high=count * step, factor=factor, ticks=tuple(index * step for index in range(count + 1)))


def seconds_from_zero(title: str, largest_s: float) -> Axis:
    """In milliseconds where all are below a second."""
    if largest_s < 1:
        return from_zero(f"{title}, ms", largest_s, factor=1e3)
    return from_zero(f"{title}, s", largest_s)


def powers_of_two(title: str, largest: float) -> Axis:
    """From 1, doubling."""
    top = max(1, math.ceil(math.log2(largest)))
    every = max(1, math.ceil(top / 8))
    return Axis(
        title=title, low=1.0, high=2.0**top, is_log=True, ticks=tuple(2.0**power for power in range(0, top + 1, every))
    )


def clock(title: str, start_s: float, end_s: float) -> Axis:
    """Time since the start, in a unit that suits its length."""
    span_s = max(end_s - start_s, 1.0)
    suits = [pair for pair in _TIME_UNITS if span_s >= _UNITS_SHOWN * pair[0]]
    unit_s, unit = suits[-1] if suits else _TIME_UNITS[0]
    step = _nice_step(span_s / unit_s / 5) * unit_s
    first = math.ceil(start_s / step)
    ticks = tuple(index * step for index in range(first, math.floor((start_s + span_s) / step) + 1))
    return Axis(title=f"{title}, {unit}", low=start_s, high=start_s + span_s, factor=1 / unit_s, ticks=ticks)


def _nice_step(least: float) -> float:
    """The smallest round number that is no less."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(nice * power for nice in _NICE if nice * power >= least * (1 - 1e-9))
