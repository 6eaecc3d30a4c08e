"""One picture: throughput over streams, and the time to the first token of a long prompt, for each shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.peers.registry import (
    CONTINUOUS,
    ENGINES,
    F32,
    GENERATE,
    MULL,
    MULL_BF16,
    MULL_GRPC,
    Q8_0,
    VLLM_BF16,
    VLLM_FP32,
)
from bench.peers.results import CellResult, ShapeResult, throughput, ttft
from bench.peers.targets import TTFT_PROMPT

STYLES = {
    MULL: ("#1b4f9c", "-"),
    MULL_BF16: ("#1b4f9c", "--"),
    MULL_GRPC: ("#1b4f9c", ":"),
    Q8_0: ("#c8553d", "-"),
    F32: ("#c8553d", "--"),
    VLLM_FP32: ("#5b8c5a", "-"),
    VLLM_BF16: ("#5b8c5a", "--"),
    GENERATE: ("#8a6fa8", "-"),
    CONTINUOUS: ("#8a6fa8", "--"),
}
"""A colour an engine, a line a form of it."""


def plot(results: Sequence[ShapeResult], out: Path) -> None:
    """Write the picture as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(8.0, 4.6 * len(results)), 7.6), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, result in enumerate(results):
        _plot_throughput(axes[0][column], result)
        _plot_first_token(axes[1][column], result)
    lines = {line.get_label(): line for ax in axes[0] for line in ax.get_lines()}
    legend = [lines[name] for name in ENGINES if name in lines]
    figure.legend(handles=legend, loc="outside lower center", ncols=4, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def _loads(result: ShapeResult) -> list[CellResult]:
    """The cells of the shortest prompt, which decode for a while, by streams."""
    decoding = [cell for cell in result.cells if cell.cell.decodes]
    prompt = min((cell.cell.prompt for cell in decoding), default=0)
    return sorted((cell for cell in decoding if cell.cell.prompt == prompt), key=lambda cell: cell.cell.streams)


def _plot_throughput(ax: Any, result: ShapeResult) -> None:
    cells = _loads(result)
    for name, (color, line) in STYLES.items():
        found = [(cell.cell.streams, spread) for cell in cells if (spread := cell.spread(name, throughput))]
        if not found:
            continue
        streams = [it for it, _ in found]
        spreads = [it for _, it in found]
        ax.plot(streams, [it.median for it in spreads], line, color=color, marker="o", markersize=4, label=name)
        ax.fill_between(streams, [it.min for it in spreads], [it.max for it in spreads], color=color, alpha=0.12)
    ax.set_title(result.shape)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks([cell.cell.streams for cell in cells], [str(cell.cell.streams) for cell in cells])
    ax.set_xlabel("streams")
    ax.set_ylabel("output tokens/s, prompts included")
    ax.grid(True, which="both", alpha=0.25)


def _plot_first_token(ax: Any, result: ShapeResult) -> None:
    cells = result.first_tokens(TTFT_PROMPT)
    found = {name: cells[0].spread(name, ttft) for name in STYLES} if cells else {}
    bars = [(name, spread) for name, spread in found.items() if spread is not None]
    ax.barh([name for name, _ in bars], [it.median for _, it in bars], color=[STYLES[name][0] for name, _ in bars])
    for row, (_, spread) in enumerate(bars):
        ax.annotate(f" {spread.median:.3g}", (spread.median, row), va="center", fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set_xlabel(f"seconds to the first token of {TTFT_PROMPT}")
