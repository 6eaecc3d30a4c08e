"""Metrics as plain numbers, which become Prometheus' own when somebody asks for them.

The library's cost microseconds each, more than anything else that a gateway does for a token by itself; these cost
tenths of one. One thread writes; any may collect.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

Labels = tuple[str, ...]
"""Values, in the order of their names."""


class Kind(Enum):
    """What Prometheus calls a type."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """A metric, as its readers know it."""

    name: str
    kind: Kind
    text: str
    labels: Labels = ()
    """Their names."""
    buckets: tuple[float, ...] = ()
    """Upper bounds, for a histogram."""
    known_as: tuple[str, ...] = ()
    """What users of other servers know it as."""


def counter(name: str, text: str, labels: Labels = (), known_as: tuple[str, ...] = ()) -> MetricSpec:
    return MetricSpec(name=name, kind=Kind.COUNTER, text=text, labels=labels, known_as=known_as)


def gauge(name: str, text: str, labels: Labels = (), known_as: tuple[str, ...] = ()) -> MetricSpec:
    return MetricSpec(name=name, kind=Kind.GAUGE, text=text, labels=labels, known_as=known_as)


def histogram(
    name: str, text: str, buckets: tuple[float, ...], labels: Labels = (), known_as: tuple[str, ...] = ()
) -> MetricSpec:
    return MetricSpec(name=name, kind=Kind.HISTOGRAM, text=text, labels=labels, buckets=buckets, known_as=known_as)


def family(spec: MetricSpec, values: Mapping[Labels, float]) -> Metric:
    """A counter or a gauge with these values."""
    make = CounterMetricFamily if spec.kind is Kind.COUNTER else GaugeMetricFamily
    made = make(spec.name, spec.text, labels=spec.labels)
    for labels, value in values.items():
        made.add_metric(labels, value)
    return made


class Counter(Collector):
    """A number that only grows, for each combination of labels."""

    def __init__(self, spec: MetricSpec, known: Iterable[Labels] = ()) -> None:
        """`known` labels are there from the beginning, at 0: what grows from nothing shows no growth."""
        self._spec = spec
        self._values: dict[Labels, float] = dict.fromkeys(known, 0) if spec.labels else {(): 0}

    def inc(self, *labels: str, by: float = 1) -> None:
        values = self._values
        values[labels] = values.get(labels, 0) + by

    def begin(self, *labels: str) -> None:
        """Show these labels, at 0 where they are new."""
        self._values.setdefault(labels, 0)

    def collect(self) -> Iterator[Metric]:
        yield family(self._spec, dict(self._values))


@dataclass(slots=True)
class _Series:
    num_observed: list[int]
    """By bucket: up to its bound, and over the one before."""
    total: float = 0.0


class Histogram(Collector):
    """How often values came, by size, for each combination of labels."""

    def __init__(self, spec: MetricSpec, known: Iterable[Labels] = ()) -> None:
        """`known`: as for a counter."""
        self._spec = spec
        self._bounds = spec.buckets
        self._series: dict[Labels, _Series] = {}
        for labels in known if spec.labels else [()]:
            self._begin(labels)

    def observe(self, value: float, *labels: str) -> None:
        series = self._series.get(labels) or self._begin(labels)
        series.num_observed[bisect_left(self._bounds, value)] += 1
        series.total += value

    def collect(self) -> Iterator[Metric]:
        spec = self._spec
        made = HistogramMetricFamily(spec.name, spec.text, labels=spec.labels)
        bounds = [*map(floatToGoString, self._bounds), "+Inf"]
        for labels, series in list(self._series.items()):
            buckets = list(zip(bounds, accumulate(series.num_observed), strict=True))
            made.add_metric(labels, buckets, series.total)
        yield made

    def _begin(self, labels: Labels) -> _Series:
        series = self._series[labels] = _Series([0] * (len(self._bounds) + 1))
        return series


@dataclass(frozen=True)
class Reading(Collector):
    """A counter or a gauge that is read when somebody asks for it."""

    spec: MetricSpec
    read: Callable[[], Mapping[Labels, float]] = field(repr=False)

    def collect(self) -> Iterator[Metric]:
        yield family(self.spec, self.read())
