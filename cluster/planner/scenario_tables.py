"""What happened, on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cluster.planner.control_plane import Part
from cluster.planner.effects import Effect
from cluster.planner.quantities import plain
from cluster.planner.scenario import Course

_ROWS = 16
_MOST_EVENTS = 20


def show_course(console: Console, course: Course) -> None:
    """The fleet over time, what happened to it, and the control plane."""
    gateways = "gateway" if course.num_gateways == 1 else "gateways"
    cells = course.scenario.num_cells
    where = "" if cells == 1 else f", in {cells} cells of which the fullest is told below"
    console.print(f"\n{course.fit.candidate} over time, behind {course.num_gateways:,} {gateways}{where}\n")
    console.print(_series_table(course))
    if course.effects:
        console.print(_effects_table(course.effects[:_MOST_EVENTS]))
        if (more := len(course.effects) - _MOST_EVENTS) > 0:
            console.print(f"and {more} more: see --json")
    console.print(_parts_table(course.parts))
    if course.tenants:
        console.print(_tenants_table(course))
    effort = course.effort
    console.print(
        f"Simulated {effort.requests:,} requests and {effort.steps:,} steps in {effort.wall_s:.0f} s: "
        f"{effort.requests_per_minute:,.0f} requests a minute."
    )


def _series_table(course: Course) -> Table:
    table = Table(title="Over time", title_justify="left", caption_justify="left")
    table.caption = "First token and first answer: of requests that came then, medians / 95th percentiles of the first."
    for head in (
        "at",
        "came",
        "refused",
        "run",
        "wait",
        "copies",
        "GPUs",
        "KV",
        "tokens/s",
        "first token s",
        "answer s",
    ):
        table.add_column(head, justify="right")
    series = course.series
    num_looks = len(series["time_s"])
    each = max(1, -(-num_looks // _ROWS))
    for first in range(0, num_looks, each):
        part = range(first, min(first + each, num_looks))
        last = part[-1]
        # Of the latencies the worst, so that nothing short is hidden.
        worst = max(part, key=lambda index: (series["ttft_p95_s"][index] or 0.0, index))
        table.add_row(
            _clock(series["time_s"][part[0]]),
            f"{sum(series['arrivals'][index] for index in part):,}",
            f"{sum(series['refused'][index] for index in part):,}",
            f"{series['running'][last]:,}",
            f"{max(series['waiting'][index] for index in part):,}",
            f"{series['copies_ready'][last]} of {series['copies'][last]}",
            f"{series['gpus'][last]:,}",
            f"{series['kv_use'][last]:.0%}",
            f"{sum(series['output_tokens_per_s'][index] for index in part) / len(part):,.0f}",
            f"{_seconds(series['ttft_p50_s'][worst])} / {_seconds(series['ttft_p95_s'][worst])}",
            _seconds(series["time_to_answer_p50_s"][worst]),
        )
    return table


def _effects_table(effects: list[Effect]) -> Table:
    table = Table(title="What happened", title_justify="left", caption_justify="left")
    table.caption = (
        "Pauses are those of streams that stood still. "
        "Settled: queue and first tokens are as before, and all streams go on."
    )
    table.add_column("at", justify="right")
    table.add_column("what")
    for head in ("stood still", "pause s", "longest", "queue", "refused", "first token s", "worst", "settled after"):
        table.add_column(head, justify="right")
    for one in effects:
        table.add_row(
            _clock(one.time_s),
            one.words,
            f"{one.paused:,}",
            _seconds(one.pause_p50_s),
            _seconds(one.pause_max_s),
            f"{one.longest_queue:,}",
            f"{one.refused:,}",
            _seconds(one.ttft_p95_before_s),
            _seconds(one.ttft_p95_worst_s),
            "not yet" if one.settled_after_s is None else _clock(one.settled_after_s),
        )
    return table


def _parts_table(parts: list[Part]) -> Table:
    table = Table(title="The control plane at its busiest", title_justify="left")
    table.add_column("part")
    for head in ("used", "limit"):
        table.add_column(head, justify="right")
    table.add_column("unit")
    table.add_column("")
    for part in parts:
        mark = "! " if part.is_over else ""
        limit = "unknown" if part.limit is None else plain(part.limit)
        table.add_row(part.part, mark + plain(part.used), limit, part.unit, part.words)
    return table


def _tenants_table(course: Course) -> Table:
    table = Table(title="The largest tenants", title_justify="left")
    table.add_column("tenant")
    for head in ("requests", "refused", "first token p95 s"):
        table.add_column(head, justify="right")
    for tenant in course.tenants:
        table.add_row(tenant.tenant, f"{tenant.requests:,}", f"{tenant.refused:,}", _seconds(tenant.ttft_p95_s))
    return table


def _clock(time_s: float) -> str:
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else plain(value)
