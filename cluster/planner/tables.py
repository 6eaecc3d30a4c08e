"""The plan on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from cluster.planner.load import Load
from cluster.planner.outcome import Quantiles
from cluster.planner.scenario_tables import show_course
from cluster.planner.survey import SHOWN_CONTEXT, STREAMS, Row
from cluster.planner.trial import Trial

if TYPE_CHECKING:
    from cluster.planner.command import Plan

_GB = 1e9


def show(plan: Plan) -> None:
    """All of it."""
    console = Console(highlight=False)
    console.print(f"{plan.model.name} on {plan.gpus} × {plan.device.title}\n")
    console.print(survey_table(plan.rows))
    if problems := problem_lines(plan.rows):
        console.print("\nDoes not fit:", *(f"  {line}" for line in problems), sep="\n")
    if plan.load is None:
        return
    console.print(f"\nLoad: {load_words(plan.load)}\n")
    if not plan.trials:
        console.print("Nothing fits, so nothing was simulated: take more or larger devices, or a shorter --context.")
        return
    console.print(trial_table(plan.trials))
    console.print(
        f"\n{verdict(plan.trials)}\n\n{plan.flags}\n\n# values of the Helm chart\n{plan.values}", soft_wrap=True
    )
    if plan.course is not None:
        show_course(console, plan.course)


def load_words(load: Load) -> str:
    lengths = load.lengths
    return (
        f"{load.rate_per_s:.3g} requests a second, on average {lengths.prompt:,} tokens of prompt, "
        f"{lengths.thinking:,} of thoughts, {lengths.answer:,} of answer"
    )


def verdict(trials: Sequence[Trial]) -> str:
    """In a sentence."""
    best = trials[0]
    outcome = best.outcome
    if outcome.keeps_up:
        busy = f"ranks are busy {outcome.utilisation:.0%} of the time"
        return f"Take {best.fit.candidate}. Its limit is {outcome.limit}; {busy}."
    return (
        f"None of these keeps up with the load. {best.fit.candidate} comes furthest, with "
        f"{outcome.output_tokens_per_s:,.0f} tokens a second; its limit is {outcome.limit}."
    )


def survey_table(rows: Sequence[Row]) -> Table:
    """A row for each layout."""
    table = Table(title="Layouts", title_justify="left", caption_justify="left")
    table.caption = (
        f"GB are of one rank; KV tokens, streams and contexts of all copies. A step decodes one token of each stream, "
        f"at {SHOWN_CONTEXT:,} tokens of context; floor / estimate."
    )
    table.add_column("layout")
    heads = ("weights GB", "KV GB", "work GB", "KV tokens", "longest context", "streams at it")
    for head in (*heads, *(f"step at {streams} ms" for streams in STREAMS)):
        table.add_column(head, justify="right")
    for row in rows:
        if row.fit.problem is None:
            table.add_row(*_cells(row))
    return table


def trial_table(trials: Sequence[Trial]) -> Table:
    """What users feel with each candidate, and what it costs."""
    table = Table(title="Simulated, the best first", title_justify="left", caption_justify="left")
    table.caption = "Seconds are medians / 95th percentiles; h/M: GPU-hours for a million answer tokens."
    table.add_column("layout")
    heads = ("first token s", "first answer s", "token ms", "tokens/s", "busy", "streams", "KV", "h/M", "limit")
    for head in heads:
        table.add_column(head, justify="left" if head == "limit" else "right")
    for trial in trials:
        table.add_row(str(trial.fit.candidate), *_trial_cells(trial))
    return table


def problem_lines(rows: Sequence[Row]) -> list[str]:
    """What does not fit, and why."""
    return [f"{row.fit.candidate}: {row.fit.problem}" for row in rows if row.fit.problem is not None]


def _cells(row: Row) -> list[str]:
    fit = row.fit
    assert fit.work is not None, "what fits was measured"
    return [
        str(fit.candidate),
        f"{fit.work.weight_bytes / _GB:.1f}",
        f"{fit.kv_bytes / _GB:.1f}",
        f"{fit.workspace_bytes / _GB:.1f}",
        f"{fit.kv_tokens:,}",
        f"{fit.longest_context:,}",
        f"{fit.most_streams(fit.longest_context):,}",
        *(f"{step.floor_s * 1e3:.1f} / {step.estimate.total_s * 1e3:.1f}" for step in row.shown_steps),
    ]


def _trial_cells(trial: Trial) -> list[str]:
    outcome = trial.outcome
    hours = outcome.gpu_hours_per_million_answer_tokens
    kept = outcome.limit if outcome.keeps_up else f"too slow: {outcome.limit}"
    return [
        _both(outcome.ttft, 1.0),
        _both(outcome.time_to_answer, 1.0),
        _both(outcome.tpot, 1e3),
        f"{outcome.output_tokens_per_s:,.0f}",
        f"{outcome.utilisation:.0%}",
        f"{outcome.mean_running:,.0f}",
        f"{outcome.kv_use:.0%}",
        "–" if hours is None else f"{hours:.2f}",
        kept,
    ]


def _both(times: Quantiles | None, factor: float) -> str:
    return "–" if times is None else f"{times.p50 * factor:.3g} / {times.p95 * factor:.3g}"
