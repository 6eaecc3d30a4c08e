"""Metrics as plain numbers: what Prometheus reads of them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from cluster.metrics.plain import Counter, Histogram, Reading, counter, gauge, histogram


def read(*collectors: object) -> list[str]:
    """The samples, as text."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)  # type: ignore[arg-type]  # what tests give is one
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_a_value_on_a_bound_is_in_its_bucket_and_in_all_above() -> None:
    times = Histogram(histogram("seconds", "Some.", (0.1, 1)))

    for value in (0.05, 0.1, 0.5, 7):
        times.observe(value)

    assert read(times) == [
        'seconds_bucket{le="0.1"} 2.0',
        'seconds_bucket{le="1.0"} 3.0',
        'seconds_bucket{le="+Inf"} 4.0',
        "seconds_count 4.0",
        "seconds_sum 7.65",
    ]


def test_labels_that_are_known_are_there_before_anything_happens() -> None:
    ends = Counter(counter("ends_total", "Some.", ("reason",)), [("stop",)])
    parts = Histogram(histogram("part_seconds", "Some.", (1,), ("part",)), [("send",)])

    ends.inc("length", by=3)

    assert read(ends) == ['ends_total{reason="stop"} 0.0', 'ends_total{reason="length"} 3.0']
    assert 'part_seconds_count{part="send"} 0.0' in read(parts)


def test_a_metric_without_labels_begins_at_nothing() -> None:
    assert read(Counter(counter("steps_total", "Some."))) == ["steps_total 0.0"]


def test_a_reading_is_taken_when_somebody_asks() -> None:
    streams = 1
    reading = Reading(gauge("streams", "Some."), lambda: {(): streams})
    assert read(reading) == ["streams 1.0"]

    streams = 2

    assert read(reading) == ["streams 2.0"]
