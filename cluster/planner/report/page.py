"""The page itself: the template, filled with the plan's JSON and the charts made of it."""

from __future__ import annotations

from pathlib import Path

import jinja2

from cluster.planner.quantities import plain
from cluster.planner.report import figures

_FOLDER = Path(__file__).parent
_MINUTE_S, _HOUR_S = 60.0, 3600.0


def render(plan: figures.Json) -> str:
    """`plan`: what `mull plan --json` prints. Every name in it is escaped; nothing outside the page is referred to."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"seconds": seconds, "plain": plain, "count": count, "gb": gigabytes, "percent": percent}
    return environment.get_template("report.html").render(plan=plan, figures=figures)


def seconds(value: float | None) -> str:
    """30.1 ms · 4.2 s · 3.5 min · 2.1 h; a dash where nobody was measured."""
    if value is None:
        return "–"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    if value < 2 * _MINUTE_S:
        return f"{value:.3g} s"
    if value < 2 * _HOUR_S:
        return f"{value / _MINUTE_S:.3g} min"
    return f"{value / _HOUR_S:.3g} h"


def count(value: float) -> str:
    return f"{value:,.0f}"


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f}"


def percent(share: float) -> str:
    return f"{share:.0%}"
