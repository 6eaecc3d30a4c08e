"""Numbers of one metrics port at one time, and what grew between two times."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from prometheus_client.parser import text_string_to_metric_families

Buckets = Mapping[float, float]
"""Observations up to each bound, as Prometheus counts them."""


class Samples:
    """What a port said. A metric that is missing has no value, and a total of nothing is 0."""

    def __init__(self, text: str = "") -> None:
        """Raises ValueError where `text` is not what Prometheus reads."""
        self._values: dict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._values[sample.name].append((sample.labels, sample.value))

    def has(self, name: str) -> bool:
        return name in self._values

    def value(self, name: str, **labels: str) -> float | None:
        """The sum over all series with these labels; None: there is none."""
        found = [value for given, value in self._values.get(name, ()) if labels.items() <= given.items()]
        return sum(found) if found else None

    def total(self, name: str, **labels: str) -> float:
        return self.value(name, **labels) or 0.0

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sum for each value of a label."""
        sums: dict[str, float] = defaultdict(float)
        for given, value in self._values.get(name, ()):
            sums[given.get(label, "")] += value
        return dict(sums)

    def text(self, name: str, label: str) -> str | None:
        """The value of a label, where all series have the same."""
        found = {given.get(label) for given, _ in self._values.get(name, ())}
        return found.pop() if len(found) == 1 else None

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """Of a histogram, summed over the series with these labels."""
        sums: dict[float, float] = defaultdict(float)
        for given, value in self._values.get(f"{name}_bucket", ()):
            if labels.items() <= given.items():
                sums[float(given["le"])] += value
        return dict(sums)


def growth(now: float, before: float) -> float:
    """Of a counter: one that is lower than before has begun again at 0."""
    return now - before if now >= before else now


def bucket_growth(now: Buckets, before: Buckets) -> Buckets:
    """The same for a histogram, which begins again as a whole."""
    begun_again = any(now[bound] < before.get(bound, 0) for bound in now)
    return now if begun_again else {bound: count - before.get(bound, 0) for bound, count in now.items()}


def quantile(share: float, buckets: Buckets) -> float | None:
    """Between the bounds of its bucket in proportion, as Prometheus estimates it; None: nothing was observed."""
    bounds = sorted(buckets)
    if not bounds or not buckets[bounds[-1]]:
        return None
    rank, low, below = share * buckets[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank:
            return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (buckets[bound] - below)
        low, below = bound, buckets[bound]
    return low


def sum_of(parts: Iterable[Buckets]) -> Buckets:
    """Several histograms of the same bounds as one."""
    sums: dict[float, float] = defaultdict(float)
    for part in parts:
        for bound, count in part.items():
            sums[bound] += count
    return sums
