"""What `mull top` shows, from what the ports said: now, and over the last seconds.

Pure: no clock, socket or terminal.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest

from cluster.top.samples import Samples, bucket_growth, growth, quantile, sum_of

SHORT_S, LONG_S = 10.0, 120.0
"""Of rates; of quantiles, which need more to be true, and of the line of tokens."""

_ALL: Mapping[str, str] = {}
_NOTHING = Samples()


@dataclass(frozen=True)
class Snapshot:
    """All ports at one time, by address; one that did not answer is missing."""

    time_s: float
    ports: Mapping[str, Samples]
    errors: Mapping[str, str] = field(default_factory=dict)
    """Why one did not answer."""


class History:
    """The snapshots of the last LONG_S."""

    def __init__(self) -> None:
        self._snapshots: deque[Snapshot] = deque()

    def add(self, snapshot: Snapshot) -> None:
        self._snapshots.append(snapshot)
        while len(self._snapshots) > 2 and snapshot.time_s - self._snapshots[1].time_s >= LONG_S:
            self._snapshots.popleft()

    @property
    def now(self) -> Snapshot:
        """The newest one; there must be one."""
        return self._snapshots[-1]

    def gateways(self) -> Figures:
        """Of all gateways together."""
        return self._of([name for name, port in self.now.ports.items() if port.has("mull_gateway_ready")])

    def routers(self) -> list[tuple[str, Figures]]:
        """Of each Router, in the order of their addresses."""
        names = [name for name, port in self.now.ports.items() if port.has("mull_engine_ready")]
        return [(name, self._of([name])) for name in sorted(names)]

    def all_routers(self) -> Figures:
        """Of all Routers together."""
        return self._of([name for name, _ in self.routers()])

    def _of(self, names: Sequence[str]) -> Figures:
        # One that had not answered would seem to grow by all that it has.
        looks = [it for it in self._snapshots if it.ports.keys() >= set(names)]
        return Figures([(it.time_s, [it.ports[name] for name in names]) for it in looks])


class Figures:
    """Numbers of some ports, summed."""

    def __init__(self, history: Sequence[tuple[float, Sequence[Samples]]]) -> None:
        """Times in seconds and what each port said, the oldest first."""
        self._history = history
        self._now_s, self._now = history[-1]

    @property
    def now(self) -> Sequence[Samples]:
        """What each port said last."""
        return self._now

    @property
    def ever(self) -> Figures:
        """The same, as if the ports had been looked at when they began to count."""
        return Figures([(self._now_s - SHORT_S, []), (self._now_s, self._now)])

    def value(self, name: str, **labels: str) -> float | None:
        """The sum over the ports; None: none has it."""
        found = [value for port in self._now if (value := port.value(name, **labels)) is not None]
        return sum(found) if found else None

    def grown(self, name: str, labels: Mapping[str, str] = _ALL, within_s: float = LONG_S) -> float:
        """How much a counter has grown within the last seconds, as far as they are known."""
        _, before = self._before(within_s)
        return _growth_of_all(name, labels, self._now, before)

    def grown_by(self, name: str, label: str) -> dict[str, float]:
        """The same for each value of a label; those that did not grow are left out."""
        values = {value for port in self._now for value in port.by(name, label)}
        grown = {value: self.grown(name, {label: value}) for value in sorted(values)}
        return {value: by for value, by in grown.items() if by}

    def rate(self, name: str, **labels: str) -> float | None:
        """Growth a second, over the last SHORT_S; None: it was looked at only once."""
        time_s, _ = self._before(SHORT_S)
        return self.grown(name, labels, SHORT_S) / (self._now_s - time_s) if self._now_s > time_s else None

    def rates(self, name: str) -> list[float]:
        """Growth a second between each two times."""
        looks = pairwise(self._history)
        return [
            _growth_of_all(name, _ALL, now, before) / (time_s - before_s) for (before_s, before), (time_s, now) in looks
        ]

    def quantile(self, share: float, name: str, **labels: str) -> float | None:
        """Over the last LONG_S; over all that was ever observed where that is nothing."""
        _, before = self._before(LONG_S)
        now = [port.buckets(name, **labels) for port in self._now]
        then = [port.buckets(name, **labels) for port in before]
        pairs = zip_longest(now, then, fillvalue=_NOTHING.buckets(name))
        lately = quantile(share, sum_of(bucket_growth(port, earlier) for port, earlier in pairs))
        return quantile(share, sum_of(now)) if lately is None else lately

    def mean(self, name: str, **labels: str) -> float | None:
        """Of a histogram's observations, over the same time."""
        count = self.grown(f"{name}_count", labels)
        if count:
            return self.grown(f"{name}_sum", labels) / count
        all_of_it = self.value(f"{name}_count", **labels)
        return (self.value(f"{name}_sum", **labels) or 0) / all_of_it if all_of_it else None

    def ratio(self, part: str, whole: str) -> float | None:
        """Of what two counters have grown; since their beginning where that is nothing; None: that is 0 too."""
        if grown := self.grown(whole):
            return self.grown(part) / grown
        all_of_it = self.value(whole)
        return (self.value(part) or 0) / all_of_it if all_of_it else None

    def _before(self, within_s: float) -> tuple[float, Sequence[Samples]]:
        """The oldest look that is not older than that; where they are further apart, the one before the newest."""
        lately = [look for look in self._history[:-1] if self._now_s - look[0] <= within_s]
        return (lately or self._history[-2:])[0]


def _growth_of_all(name: str, labels: Mapping[str, str], now: Sequence[Samples], before: Sequence[Samples]) -> float:
    """Each port by itself: the others still count when one begins again."""
    pairs = zip_longest(now, before, fillvalue=_NOTHING)
    return sum(growth(port.total(name, **labels), then.total(name, **labels)) for port, then in pairs)
