"""The few shapes of query that the dashboards are made of, each for the chosen installations alone."""

from __future__ import annotations

CHOSEN = 'installation=~"$installation"'
"""The label comes from who scrapes: the chart's PodMonitors and the compose file set it."""


def series(metric: str, where: str = "") -> str:
    """`where` is one more label matcher."""
    return f"{metric}{{{CHOSEN}{', ' if where else ''}{where}}}"


def rate(metric: str, by: str = "", where: str = "") -> str:
    """A second's growth of a counter, summed."""
    return f"{_sum(by)}(rate({series(metric, where)}[$__rate_interval]))"


def total(metric: str, by: str = "", where: str = "") -> str:
    """A gauge, summed."""
    return f"{_sum(by)}({series(metric, where)})"


def growth(metric: str, by: str = "", where: str = "") -> str:
    """What a counter of rare events gained in the time shown."""
    return f"{_sum(by)}(increase({series(metric, where)}[$__range]))"


def events(metric: str, by: str = "") -> str:
    """The same as a whole number: Prometheus extrapolates."""
    return f"round({growth(metric, by)})"


def quantile(q: float, histogram: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q:g}, {rate(f'{histogram}_bucket', labels)})"


def mean(histogram: str, by: str = "") -> str:
    """Of what was observed lately."""
    return ratio(rate(f"{histogram}_sum", by), rate(f"{histogram}_count", by))


def ratio(part: str, whole: str) -> str:
    """Nothing where the whole is 0."""
    return f"{part} / ({whole} > 0)"


def _sum(by: str) -> str:
    return f"sum by ({by}) " if by else "sum"
