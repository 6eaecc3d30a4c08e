"""Every layout of so many ranks beside each other: what fits, what it holds, and how long its steps are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from cluster.planner.layouts import Candidate, Fit, Limits, candidates, fit
from cluster.planner.roofline import StepTime
from cluster.planner.setting import Setting
from cluster.planner.step_shape import GroupShape, StepShape

STREAMS = (1, 32)
"""Streams of all copies for which step times are always given."""
_MOST_STREAMS = 4096
"""For which they are given, where so many have room."""
SHOWN_CONTEXT = 4096
_CLEARLY = 0.9
"""Times another step: faster by more than what estimates are worth."""


@dataclass(frozen=True, kw_only=True)
class StepFigure:
    """A decode step with so many streams over all copies."""

    streams: int
    floor_s: float | None
    """What the hardware's peaks allow; None: they are not known."""
    estimate: StepTime


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate."""

    fit: Fit
    steps: Sequence[StepFigure] = ()
    """None where it does not fit."""

    @property
    def shown_steps(self) -> list[StepFigure]:
        """Those of STREAMS."""
        return [step for step in self.steps if step.streams in STREAMS]

    def as_json(self) -> dict[str, Any]:
        fit, layout = self.fit, self.fit.candidate.layout
        out: dict[str, Any] = {
            "layout": str(fit.candidate),
            "copies": fit.candidate.copies,
            "tp": layout.tp,
            "dp": layout.dp,
            "expert_tp": layout.expert_tp,
            "fits": fit.problem is None,
            "problem": fit.problem,
        }
        if fit.work is not None:
            out |= {
                "weight_bytes_per_rank": fit.work.weight_bytes,
                "workspace_bytes_per_rank": fit.workspace_bytes,
                "kv_bytes_per_rank": fit.kv_bytes,
                "kv_bytes_per_token_and_rank": fit.work.kv_token_bytes,
                "kv_tokens": fit.kv_tokens,
                "longest_context": fit.longest_context,
                "most_streams_at_longest_context": fit.most_streams(fit.longest_context),
            }
        out["decode_steps"] = [
            {
                "streams": step.streams,
                "floor_s": step.floor_s,
                "estimate_s": step.estimate.total_s,
                **step.estimate._asdict(),
            }
            for step in self.steps
        ]
        return out


def survey(setting: Setting, num_ranks: int, limits: Limits) -> list[Row]:
    """All candidates, those that fit first."""
    rows = [
        _row(setting, fit(setting.model, candidate, setting.device, limits, setting.redundant_experts))
        for candidate in candidates(setting.model, num_ranks)
    ]
    return sorted(rows, key=lambda row: row.fit.problem is not None)


def without_lesser(rows: Sequence[Row]) -> list[Row]:
    """Of layouts that differ in `expert_tp` alone: that with whole experts, and the fastest where it is clearly so."""
    places: dict[tuple[int, int, int], list[Row]] = {}
    for row in rows:
        candidate = row.fit.candidate
        places.setdefault((candidate.copies, candidate.layout.tp, candidate.layout.dp), []).append(row)
    kept = {id(row) for alike in places.values() for row in _worth_showing(alike)}
    return [row for row in rows if id(row) in kept]


def _worth_showing(alike: Sequence[Row]) -> list[Row]:
    whole = min(alike, key=lambda row: row.fit.candidate.layout.expert_tp)
    best = min(alike, key=_step_s)
    return [whole, best] if _step_s(best) < _CLEARLY * _step_s(whole) else [whole]


def _step_s(row: Row) -> float:
    """Of the most streams that are always shown; without end where it does not fit."""
    return row.shown_steps[-1].estimate.total_s if row.steps else inf


def _row(setting: Setting, fitted: Fit) -> Row:
    if fitted.problem is not None:
        return Row(fit=fitted)
    floor, estimate = setting.floor(fitted), setting.cost(fitted)
    context = min(SHOWN_CONTEXT, fitted.longest_context)
    steps = []
    for streams in _streams(fitted.most_streams(context)):
        shape = decode_shape(fitted.candidate, streams, context)
        floor_s = None if floor is None else floor.step(shape).total_s
        steps.append(StepFigure(streams=streams, floor_s=floor_s, estimate=estimate.step(shape)))
    return Row(fit=fitted, steps=steps)


def _streams(most: int) -> list[int]:
    """Powers of two, as far as they have room; and those that are always given."""
    return sorted({*STREAMS, *(2**power for power in range(min(most, _MOST_STREAMS).bit_length()))})


def decode_shape(candidate: Candidate, streams: int, context: int) -> StepShape:
    """What one copy decodes in a step when so many streams are spread over all copies."""
    here = -(-streams // candidate.copies)
    groups = candidate.layout.dp
    counts = [here // groups + (index < here % groups) for index in range(groups)]
    return [GroupShape(num_decodes=count, decode_context=count * context) for count in counts]
