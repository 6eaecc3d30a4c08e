"""The load that is planned for, as the command line names it: picklable, for processes that simulate it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cluster.planner.workload import (
    BURST_EVERY_S,
    BURST_FACTOR,
    BURST_LASTS_S,
    BURST_OF_MEAN,
    Arrival,
    Drawn,
    Lengths,
    Rate,
    bursty,
    diurnal,
    doubled,
    drawn,
    later,
    mean_drawn,
    mean_lengths,
    steady,
)

Pattern = Literal["steady", "diurnal", "bursty"]

_MOST_OF_MEAN = {"steady": 1.0, "diurnal": 1.6, "bursty": BURST_OF_MEAN}
"""The largest rate of a pattern is so many times its mean."""


@dataclass(frozen=True, kw_only=True)
class DrawnLoad:
    """Requests that come by chance, at a rate."""

    rate_per_s: float
    lengths: Lengths
    pattern: Pattern = "steady"
    tenants: int = 1
    seed: int = 0
    double_at_s: float | None = None
    begins_s: float = 0.0
    """Of the pattern; before that, no more than the mean comes."""
    shared_prompt_tokens: int = 0
    """All prompts begin with these: a system prompt."""
    day_s: float = 86400.0
    """Of the diurnal pattern."""

    def arrivals(self, context: int) -> Iterator[Arrival]:
        """Without an end."""
        most = self.most_per_s * (1 if self.double_at_s is None else 2)
        return drawn(self.rate(), most, self.lengths, seed=self.seed, context=context, tenants=self.tenants)

    def as_json(self) -> dict[str, Any]:
        return _described(self, self.pattern)

    @property
    def most_per_s(self) -> float:
        """The largest rate of its pattern."""
        return self.rate_per_s * _MOST_OF_MEAN[self.pattern]

    def most_output_tokens_per_s(self, life_s: float, context: int) -> float:
        """Thoughts and answers that it asks for when most requests are under way, which last so long."""
        return self._most_under_way_per_s(life_s) * self.as_drawn(context).output_tokens

    def _most_under_way_per_s(self, life_s: float) -> float:
        """Bursts that are shorter than requests are less than their rate."""
        if self.pattern != "bursty" or life_s <= BURST_LASTS_S:
            return self.most_per_s
        share = BURST_LASTS_S / min(life_s, BURST_EVERY_S)
        return self.most_per_s * (share + (1 - share) / BURST_FACTOR)

    def as_drawn(self, context: int) -> Drawn:
        """What becomes of the mean lengths where lengths are cut to the context."""
        return mean_drawn(self.lengths, context)

    def rate(self) -> Rate:
        mean = self.rate_per_s
        match self.pattern:
            case "steady":
                rate = steady(mean)
            case "diurnal":
                rate = diurnal(mean, day_s=self.day_s)
            case "bursty":
                rate = bursty(mean)
        if self.begins_s:
            rate = later(rate, self.begins_s, before_per_s=min(mean, rate(0.0)))
        return rate if self.double_at_s is None else doubled(rate, self.double_at_s)


@dataclass(frozen=True, kw_only=True)
class TraceLoad:
    """Requests that came once."""

    trace: tuple[Arrival, ...]
    shared_prompt_tokens: int = 0

    @property
    def lengths(self) -> Lengths:
        return mean_lengths(self.trace)

    @property
    def rate_per_s(self) -> float:
        """Over the time of the trace; of one without duration, all in a second."""
        return len(self.trace) / max(1.0, self.trace[-1].time_s - self.trace[0].time_s)

    def as_json(self) -> dict[str, Any]:
        return _described(self, "a trace")


Load = DrawnLoad | TraceLoad


def _described(load: Load, pattern: str) -> dict[str, Any]:
    lengths = load.lengths
    return {
        "rate_per_s": load.rate_per_s,
        "pattern": pattern,
        "prompt": lengths.prompt,
        "thinking": lengths.thinking,
        "answer": lengths.answer,
        "shared_prompt": load.shared_prompt_tokens,
    }
