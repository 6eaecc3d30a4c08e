"""The plan on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from cluster.planner.survey import SHOWN_CONTEXT, STREAMS, Row

_GB = 1e9


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
        *(f"{step.floor_s * 1e3:.1f} / {step.estimate.total_s * 1e3:.1f}" for step in row.steps),
    ]
