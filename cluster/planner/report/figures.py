"""Which charts the report has: a part of the plan's JSON in, titled drawings out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cluster.planner.layouts import Candidate
from cluster.planner.report import charts
from cluster.planner.report.axes import Axis, clock, from_zero, powers_of_two, seconds_from_zero
from cluster.planner.report.charts import Bar, Layer, Line, Moment, Spread
from workers.layout import ParallelLayout

Json = Mapping[str, Any]

STEP_PARTS = (
    ("dense_s", "dense layers", "c1"),
    ("experts_s", "experts", "c2"),
    ("attention_s", "attention of decodes", "c3"),
    ("prefill_attention_s", "attention of prefills", "c4"),
    ("collectives_s", "collectives", "c5"),
    ("overhead_s", "launches and host", "c6"),
)
MEMORY_PARTS = (
    ("weight_bytes_per_rank", "weights", "c1"),
    ("workspace_bytes_per_rank", "workspace", "c4"),
    ("kv_bytes_per_rank", "KV", "c3"),
)
_SPREADS = (
    ("ttft", "Time to the first token"),
    ("time_to_answer", "Time to the first token of the answer"),
    ("tpot", "Time of a token"),
)
_FEW = 4
_COMPARED = 4
"""Layouts whose lines are drawn."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart and what it is called."""

    title: str
    drawing: Markup


@dataclass(frozen=True, kw_only=True)
class Course:
    """A chart over time: its lines are (column of the series, name, classes)."""

    title: str
    unit: str
    lines: Sequence[tuple[str, str, str]]
    is_seconds: bool = False


COURSES = (
    Course(title="Queue", unit="requests", lines=(("waiting", "waiting", "c2"), ("running", "running", "c1"))),
    Course(
        title="Requests",
        unit="per bucket",
        lines=(("arrivals", "come", "c1"), ("ended", "end", "c3"), ("refused", "refused", "c5")),
    ),
    Course(
        title="Time to the first token",
        unit="by arrival",
        lines=(("ttft_p95_s", "95th percentile", "c2"), ("ttft_p50_s", "median", "c1")),
        is_seconds=True,
    ),
    Course(
        title="Time to the answer",
        unit="by arrival",
        lines=(("time_to_answer_p95_s", "95th percentile", "c2"), ("time_to_answer_p50_s", "median", "c1")),
        is_seconds=True,
    ),
    Course(title="Time of a token", unit="by arrival", lines=(("tpot_p50_s", "median", "c1"),), is_seconds=True),
    Course(title="Throughput", unit="tokens a second", lines=(("output_tokens_per_s", "output", "c1"),)),
    Course(title="Copies", unit="copies", lines=(("copies", "started", "c6"), ("copies_ready", "ready", "c3"))),
    Course(title="KV in use", unit="share", lines=(("kv_use", "blocks", "c4"),)),
    Course(
        title="Control plane",
        unit="share of a core",
        lines=(("gateway_cpu", "a gateway", "c1"), ("router_cpu", "the busiest Router", "c2")),
    ),
)


def memory_bar(layout: Json, device_bytes: int) -> Markup:
    """Of a rank, beside the memory of its device."""
    parts = [(f"{name}: {layout[key] / 1e9:.1f} GB", layout[key], css) for key, name, css in MEMORY_PARTS]
    return charts.inline_bar(f"memory of a rank of {layout['layout']}", parts, device_bytes)


def use_bar(part: Json) -> Markup:
    """Of a part of the control plane, beside its limit."""
    share = part["used"] / part["limit"]
    return charts.inline_bar(part["part"], [(f"{share:.0%}", share, "c5" if part["is_over"] else "c1")], 1.0)


def layout_name(candidate: Json) -> str:
    """As the tables have it."""
    layout = ParallelLayout(tp=candidate["tp"], dp=candidate["dp"], expert_tp=candidate["expert_tp"])
    return str(Candidate(layout=layout, copies=candidate["copies"]))


def compared(plan: Json) -> list[Json]:
    """Those simulated, the best first; without a load, those whose single stream is fastest."""
    by_name = {layout["layout"]: layout for layout in plan["layouts"] if layout["fits"]}
    simulated = [by_name[trial["layout"]] for trial in plan.get("simulated", [])]
    fastest = sorted(by_name.values(), key=lambda layout: float(layout["decode_steps"][0]["estimate_s"]))
    return (simulated or fastest)[:_COMPARED]


def parts_of(steps: Iterable[Json]) -> list[tuple[str, str, str]]:
    """Of STEP_PARTS, those that some of these steps have."""
    known = list(steps)
    return [part for part in STEP_PARTS if any(step[part[0]] > 0 for step in known)]


def step_lines(layouts: Sequence[Json]) -> Markup:
    """Estimates and floors of several layouts, by streams."""
    most = max(step["estimate_s"] for layout in layouts for step in layout["decode_steps"])
    shown = []
    for index, layout in enumerate(layouts):
        for key, css in (("estimate_s", ""), ("floor_s", " dashed")):
            points = [(step["streams"], step[key]) for step in layout["decode_steps"] if step[key] is not None]
            shown.append(Line(name=layout["layout"], points=points, css=f"c{index + 1}{css}"))
    return charts.lines(_streams_axis(layouts), seconds_from_zero("step", most), shown)


def trade_off(layouts: Sequence[Json], gpus: int) -> Markup:
    """With more streams a device gives more, and each stream less."""
    shown = []
    for index, layout in enumerate(layouts):
        steps = layout["decode_steps"]
        points = [(1 / step["estimate_s"], step["streams"] / step["estimate_s"] / gpus) for step in steps]
        shown.append(Line(name=layout["layout"], points=points, css=f"c{index + 1}"))
    x = from_zero("tokens a second of a stream", max(point[0] for line in shown for point in line.points))
    y = from_zero("tokens a second of a GPU", max(line.largest for line in shown))
    return charts.lines(x, y, shown)


def step_layers(layouts: Sequence[Json]) -> list[Figure]:
    """Where a step's time goes, by streams, in a chart for each layout; all of one scale."""
    most = max(step["estimate_s"] for layout in layouts for step in layout["decode_steps"])
    found = []
    for layout in layouts:
        steps = layout["decode_steps"]
        places = [step["streams"] for step in steps]
        stacked = [Layer(name=name, values=[step[key] for step in steps], css=css) for key, name, css in STEP_PARTS]
        known = [(step["streams"], step["floor_s"]) for step in steps if step["floor_s"] is not None]
        floor = Line(name="floor", points=known, css="ink dashed")
        drawing = charts.layers(_streams_axis(layouts), seconds_from_zero("step", most), places, stacked, floor)
        found.append(Figure(title=layout["layout"], drawing=drawing))
    return found


def simulated_spreads(trials: Sequence[Json]) -> list[Figure]:
    """What users feel with each layout."""
    found = []
    for key, title in _SPREADS:
        rows = [Spread(name=trial["layout"], **trial[key]) for trial in trials if trial[key] is not None]
        if rows:
            axis = seconds_from_zero("p50 · p95 · p99", max(row.p99 for row in rows))
            found.append(Figure(title=title, drawing=charts.spreads(axis, rows)))
    return found


def simulated_steps(trials: Sequence[Json]) -> Figure:
    """Where the mean step went under the load."""
    totals = [sum(trial["mean_step"].values()) for trial in trials]
    axis = seconds_from_zero("mean step", max(totals))
    rows = [
        Bar(
            name=trial["layout"],
            note=axis.label(total),
            parts=[(name, trial["mean_step"][key], css) for key, name, css in STEP_PARTS],
        )
        for trial, total in zip(trials, totals, strict=True)
    ]
    return Figure(title="Where the mean step goes", drawing=charts.bars(axis, rows))


def courses(run: Json) -> list[tuple[Course, Figure]]:
    """Of a what-if or a fleet: what is known over time, with what happened marked."""
    series = run["series"]
    times: list[float] = series["time_s"]
    if len(times) < 2:
        return []
    x = clock("time", 0.0, times[-1] + (times[1] - times[0]) / 2)
    moments = [Moment(time_s=event["time_s"], name=event["what"]) for event in run.get("events", [])]
    moments = [moment for moment in moments if moment.time_s <= x.high]
    found = []
    for course in COURSES:
        shown = [
            Line(name=name, points=list(zip(times, series[key], strict=True)), css=css)
            for key, name, css in course.lines
            if any(value is not None for value in series.get(key, []))
        ]
        if shown:
            most = max(line.largest for line in shown)
            y = seconds_from_zero(course.unit, most) if course.is_seconds else _amount(course.unit, most)
            found.append((course, Figure(title=course.title, drawing=charts.lines(x, y, shown, moments))))
    return found


def _amount(unit: str, most: float) -> Axis:
    """Of few whole things each has its tick."""
    return from_zero(unit, most, num_ticks=int(most) if 1 <= most < _FEW else _FEW)


def _streams_axis(layouts: Sequence[Json]) -> Axis:
    most = max(step["streams"] for layout in layouts for step in layout["decode_steps"])
    return powers_of_two("streams of all copies", most)
