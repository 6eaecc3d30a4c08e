"""What the runs found, and the figures that are drawn from it: medians, spreads, ratios between engines."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.limits import Limits
from bench.peers.cells import Cell, Figures
from bench.peers.engine_process import Memory
from bench.peers.registry import MULL
from bench.report import Spread

Turn = tuple[int, int]
"""Which engines were loaded together, and the round: runs of one turn followed each other within a minute or so."""
Value = Callable[[Figures], float | None]
FAR_BEHIND = 2.0
ROUNDS_TO_JUDGE = 2


def throughput(figures: Figures) -> float:
    return figures.tokens_per_s


def ttft(figures: Figures) -> float:
    return figures.ttft_s


def tpot(figures: Figures) -> float | None:
    return figures.tpot_s


@dataclass
class CellResult:
    """All rounds of a cell: figures by engine and turn, or why there are none."""

    cell: Cell
    figures: dict[str, dict[Turn, Figures]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    limits: list[Limits] = field(default_factory=list)

    def spread(self, engine: str, value: Value) -> Spread | None:
        """None where the engine has no such figure."""
        found = [value(figures) for figures in self.figures.get(engine, {}).values()]
        values = [it for it in found if it is not None]
        return Spread.of(values) if values else None

    def ratio(self, engine: str, other: str, value: Value) -> Spread | None:
        """The engine's figure over the other's, of the turns that both had: the machine's mood is in both.

        Where they had none together: by way of mull, which was beside both, or else of their medians.
        """
        if ratios := self._ratios(engine, other, value):
            return Spread.of(ratios)
        to_mull, from_mull = self._ratios(engine, MULL, value), self._ratios(MULL, other, value)
        if to_mull and from_mull:
            return Spread.of([statistics.median(to_mull) * statistics.median(from_mull)])
        ours, theirs = self.spread(engine, value), self.spread(other, value)
        return Spread.of([ours.median / theirs.median]) if ours and theirs else None

    def _ratios(self, engine: str, other: str, value: Value) -> list[float]:
        """One for each turn that both had."""
        ours, theirs = self.figures.get(engine, {}), self.figures.get(other, {})
        pairs = [(value(ours[turn]), value(theirs[turn])) for turn in ours if turn in theirs]
        return [a / b for a, b in pairs if a is not None and b is not None]

    def is_far_behind(self, engine: str) -> bool:
        """Less than half as fast as the fastest in two rounds: more of them would change nothing."""
        if len(self.figures.get(engine, {})) < ROUNDS_TO_JUDGE:
            return False
        medians = {name: spread.median for name in self.figures if (spread := self.spread(name, throughput))}
        return engine in medians and FAR_BEHIND * medians[engine] < max(medians.values())

    @property
    def read_gb_per_s(self) -> float:
        return statistics.median(limits.read_gb_per_s for limits in self.limits)

    @property
    def fp32_gflop_per_s(self) -> float:
        return statistics.median(limits.fp32_gflop_per_s for limits in self.limits)

    def as_json(self) -> dict[str, Any]:
        engines: dict[str, Any] = {
            name: {
                "tokens_per_s": self.spread(name, throughput),
                "ttft_s": self.spread(name, ttft),
                "tpot_s": self.spread(name, tpot),
            }
            for name in self.figures
        }
        engines |= {name: {"missing": why} for name, why in self.failures.items()}
        limits = [asdict(it) for it in self.limits]
        cell = {**asdict(self.cell), "without": sorted(self.cell.without)}
        return {"cell": str(self.cell), **cell, "limits": limits, "engines": engines}


@dataclass
class ShapeResult:
    """What was found of one shape."""

    shape: str
    cells: list[CellResult]
    memory: dict[str, Memory] = field(default_factory=dict)
    idle_cpu: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    """Share of greedy tokens that are mull's own."""
    missing: dict[str, str] = field(default_factory=dict)
    """Engines that could not run, and why."""

    def decoding(self, streams: int) -> list[CellResult]:
        """The cells of so many streams that generate."""
        return [result for result in self.cells if result.cell.streams == streams and result.cell.decodes]

    def first_tokens(self, prompt: int) -> list[CellResult]:
        """The cells of one stream that are there for the first token after such a prompt."""
        return [it for it in self.cells if it.cell.prompt == prompt and it.cell.streams == 1 and not it.cell.decodes]

    def as_json(self) -> dict[str, Any]:
        return {
            "cells": [cell.as_json() for cell in self.cells],
            "memory": {name: asdict(memory) for name, memory in self.memory.items()},
            "idle_cpu": self.idle_cpu,
            "agreement": self.agreement,
            "missing": self.missing,
        }
