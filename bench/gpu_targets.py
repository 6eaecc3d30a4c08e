"""What the GPU path is meant to reach on one H200, held against what `bench.gpu` has measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.report import Spread


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure of one row."""

    name: str
    part: str
    """Of the results."""
    row: dict[str, Any]
    """What the row says of itself."""
    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def is_met(self, found: float) -> bool:
        return (self.at_least is None or found >= self.at_least) and (self.at_most is None or found <= self.at_most)


SERVED_4B = {"model": "4b", "engine": "mull", "streams": 1}
TP8 = {"model": "235b", "tp": 8, "communication": 1.0, "keys": 4096}
TARGETS = (
    Target(
        name="4B, one stream, seconds a token", part="servings", row=SERVED_4B | {"prompt": 64}, figure="tpot_s",
        at_most=1 / 550,
    ),
    Target(
        name="4B, 64 streams of 4k, share of the floor", part="slices",
        row={"model": "4b", "tp": 1, "streams": 64, "keys": 4096}, figure="share_of_floor", at_least=0.65,
    ),
    Target(
        name="4B, prompt tokens a second", part="servings", row=SERVED_4B | {"prompt": 8192},
        figure="prompt_tokens_per_s", at_least=50_000,
    ),
    Target(name="235B tp 8, one stream, seconds a step", part="slices", row=TP8 | {"streams": 1}, figure="step_s",
           at_most=5e-3),
    Target(name="235B tp 8, 64 streams, seconds a step", part="slices", row=TP8 | {"streams": 64}, figure="step_s",
           at_most=16e-3),
    Target(
        name="experts of 64 tokens, GB/s", part="kernels",
        row={"case": "experts 16 of 128 (4096, 1536), 64 tokens, uniform"}, figure="gb_per_s", at_least=2600,
    ),
    Target(name="loading, share of reading", part="servings", row={"model": "4b", "engine": "rank alone"},
           figure="share_of_read_rate", at_least=0.8),
    Target(name="idle share of a decode step", part="servings", row={"mode": "plain", "model": "4b", "streams": 1},
           figure="idle_share", at_most=0.05),
)  # fmt: skip


def held_against(results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each target: what was found, and whether that is enough; None where it was not measured."""
    for target in TARGETS:
        limit = {"at_least": target.at_least} if target.at_most is None else {"at_most": target.at_most}
        found = _found(results, target)
        yield (
            {"target": target.name}
            | limit
            | {"found": found, "is_met": None if found is None else target.is_met(found)}
        )


def _found(results: dict[str, Any], target: Target) -> float | None:
    for row in results.get(target.part, []):
        if target.figure in row and all(row.get(name) == value for name, value in target.row.items()):
            value = row[target.figure]
            return float(value.median if isinstance(value, Spread) else value)
    return None
