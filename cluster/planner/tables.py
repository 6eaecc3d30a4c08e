"""The plan on a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.planner.layouts import Candidate
from cluster.planner.load import DrawnLoad, Load, TraceLoad
from cluster.planner.outcome import Outcome, Quantiles
from cluster.planner.quantities import plain
from cluster.planner.scenario_tables import show_course
from cluster.planner.survey import SHOWN_CONTEXT, STREAMS, Row
from cluster.planner.trial import Trial

if TYPE_CHECKING:
    from cluster.planner.command import Plan

_GB = 1e9
_WIDE, _MIDDLING = 132, 110
"""Columns of a terminal that shows all, and of one that shows what matters most and a little more."""
_MANY_CUT = 0.01
_TOO_SLOW = "!"


def show(plan: Plan) -> None:
    """All of it."""
    # A file or a pipe has no width: nothing is left out there.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    console.print(f"{plan.model.name} on {plan.gpus} × {plan.device.title}\n")
    console.print(survey_table(plan.rows, console.width))
    if problems := problem_lines(plan.rows):
        console.print("\nDoes not fit:", *(f"  {line}" for line in problems), sep="\n")
    if plan.load is None:
        return
    console.print(f"\nLoad: {load_words(plan.load, plan.limits.context)}\n")
    if not plan.trials:
        console.print("Nothing fits, so nothing was simulated: take more or larger devices, or a shorter --context.")
        return
    console.print(trial_table(plan.trials, console.width))
    console.print(f"\n{verdict(plan.trials, plan.load)}", soft_wrap=True)
    console.print(f"\n{plan.flags}\n\n# values of the Helm chart\n{plan.values}", soft_wrap=True)
    if plan.course is not None:
        show_course(console, plan.course)


def load_words(load: Load, context: int) -> str:
    lengths = load.lengths
    words = (
        f"{load.rate_per_s:.3g} requests a second, on average {lengths.prompt:,} tokens of prompt, "
        f"{lengths.thinking:,} of thoughts, {lengths.answer:,} of answer"
    )
    cut_share = load.as_drawn(context).cut_share if isinstance(load, DrawnLoad) else 0.0
    return words if cut_share < _MANY_CUT else f"{words}; {cut_share:.0%} are longer than the context, and cut to it"


def verdict(trials: Sequence[Trial], load: Load) -> str:
    """In a sentence or two."""
    best = trials[0]
    outcome = best.outcome if best.busiest is None else best.busiest
    when = "" if best.busiest is None else " in the busiest hour"
    if best.keeps_up:
        busy = f"ranks are busy {outcome.utilisation:.0%} of the time{when}"
        if best.busiest is not None:
            busy += f", {best.outcome.utilisation:.0%} of the day"
        busy += f", with {plain(outcome.mean_running)} of {best.most_streams(load.lengths):,} streams that have room"
        return f"Take {best.fit.candidate}. Its limit is {outcome.limit}; {busy}."
    furthest = (
        f"None of these keeps up with the load{when}. {best.fit.candidate} comes furthest, with "
        f"{outcome.output_tokens_per_s:,.0f} tokens a second; its limit is {outcome.limit}."
    )
    match load:
        case DrawnLoad():
            asked = load.most_output_tokens_per_s(best.settled.life_s(load.lengths), best.fit.limits.context)
            at_most = " in its bursts" if load.pattern == "bursty" else when
            gpus = gpus_for(asked, best.fit.candidate, outcome)
            return (
                f"{furthest} The load asks for {asked:,.0f}{at_most}, which takes about {gpus:,} such "
                f"GPUs: try --gpus {gpus}."
            )
        case TraceLoad():
            return furthest


def gpus_for(tokens_per_s: float, candidate: Candidate, outcome: Outcome) -> int:
    """Of as many copies as would give so many, were each as full as here."""
    copies = math.ceil(candidate.copies * tokens_per_s / max(1.0, outcome.output_tokens_per_s))
    return max(copies, candidate.copies + 1) * candidate.layout.world_size


def survey_table(rows: Sequence[Row], width: int) -> Table:
    """A row for each layout; in a narrow place without the columns that say least."""
    caption = (
        "GB are of one rank; KV tokens, context and streams at it of all copies. A step decodes one token of each "
        f"stream, at {SHOWN_CONTEXT:,} tokens of context; floor / estimate."
    )
    heads = ["weights GB", "KV GB", "work GB", "KV tokens", "context", "streams", *(f"step of {n} ms" for n in STREAMS)]
    least = _left_out(width, ("work GB", "context"), ("weights GB", "KV GB", f"step of {STREAMS[0]} ms"))
    table = _table("Layouts", caption, heads, least)
    for row in rows:
        if row.fit.problem is None:
            _add(table, str(row.fit.candidate), dict(zip(heads, _cells(row), strict=True)), least)
    return table


def trial_table(trials: Sequence[Trial], width: int) -> Table:
    """What users feel with each candidate, and what it costs."""
    caption = "Seconds are medians / 95th percentiles; h/M: GPU-hours for a million answer tokens."
    heads = ["first token s", "answer s", "token ms", "tokens/s", "h/M", "busy", "streams", "KV", "limit"]
    least = _left_out(width, ("busy", "streams", "KV", "limit"), ("token ms",))
    is_marked = "limit" in least  # which says so where there is room for it
    if is_marked and not all(trial.keeps_up for trial in trials):
        caption += f" {_TOO_SLOW}: too slow for the load."
    table = _table("Simulated, the best first", caption, heads, least)
    for trial in trials:
        mark = f"{_TOO_SLOW} " if is_marked and not trial.keeps_up else ""
        _add(table, f"{mark}{trial.fit.candidate}", dict(zip(heads, _trial_cells(trial.outcome), strict=True)), least)
        if trial.busiest is not None:
            _add(table, "  in the busiest hour", dict(zip(heads, _trial_cells(trial.busiest), strict=True)), least)
    return table


def _left_out(width: int, first: Sequence[str], then: Sequence[str]) -> Sequence[str]:
    """Columns that would leave the others no room for their figures."""
    if width >= _WIDE:
        return ()
    return first if width >= _MIDDLING else (*first, *then)


def problem_lines(rows: Sequence[Row]) -> list[str]:
    """What does not fit, and why."""
    return [f"{row.fit.candidate}: {row.fit.problem}" for row in rows if row.fit.problem is not None]


def _table(title: str, caption: str, heads: Sequence[str], least: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("layout", no_wrap=True, overflow="fold")
    for head in heads:
        if head not in least:
            table.add_column(head, justify="left" if head == "limit" else "right", no_wrap=head != "limit")
    return table


def _add(table: Table, name: str, cells: dict[str, str], least: Sequence[str]) -> None:
    table.add_row(name, *(cell for head, cell in cells.items() if head not in least))


def _cells(row: Row) -> list[str]:
    fit = row.fit
    assert fit.work is not None, "what fits was measured"
    return [
        f"{fit.work.weight_bytes / _GB:.1f}",
        f"{fit.kv_bytes / _GB:.1f}",
        f"{fit.workspace_bytes / _GB:.1f}",
        f"{fit.kv_tokens:,}",
        f"{fit.longest_context:,}",
        f"{fit.most_streams(fit.longest_context):,}",
        *(f"{_ms(step.floor_s)} / {_ms(step.estimate.total_s)}" for step in row.shown_steps),
    ]


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.1f}"


def _trial_cells(outcome: Outcome) -> list[str]:
    hours = outcome.gpu_hours_per_million_answer_tokens
    return [
        _both(outcome.ttft, 1.0),
        _both(outcome.time_to_answer, 1.0),
        _both(outcome.tpot, 1e3),
        f"{outcome.output_tokens_per_s:,.0f}",
        "–" if hours is None else f"{hours:.2f}",
        f"{outcome.utilisation:.0%}",
        plain(outcome.mean_running),
        f"{outcome.kv_use:.0%}",
        outcome.limit if outcome.keeps_up else f"too slow: {outcome.limit}",
    ]


def _both(times: Quantiles | None, factor: float) -> str:
    return "–" if times is None else f"{plain(times.p50 * factor)} / {plain(times.p95 * factor)}"
