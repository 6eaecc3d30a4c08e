"""Numbers of the command line."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from cluster.planner.quantities import parse_count, parse_duration_s, parse_rate_per_s


@pytest.mark.parametrize(
    ("text", "count"), [("512", 512), ("2k", 2000), ("32Ki", 32768), ("1.5k", 1500), ("1M", 10**6)]
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("500ms", 0.5), ("5m", 300), ("2h", 7200), ("1d", 86400)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    ("text", "rate"), [("2/s", 2), ("120/min", 2), ("3", 3), ("1k/h", 1000 / 3600), ("0.5/s", 0.5)]
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate_per_s(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "k", "-1", "0", "1.5", "2 apples", "1e3", "٣"])
def test_what_is_no_count_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match=r"2k \(2,000\)"):
        parse_count(text)


def test_what_is_no_rate_or_duration_is_refused_with_examples() -> None:
    with pytest.raises(ConfigError, match="write it as 2/s"):
        parse_rate_per_s("0/s")
    with pytest.raises(ConfigError, match="write it as 500ms"):
        parse_duration_s("soon")
