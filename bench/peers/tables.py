"""What a run prints at its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from bench.peers.registry import ENGINES, IN_PROCESS, MULL_GRPC, PEERS
from bench.peers.results import CellResult, ShapeResult, throughput, tpot, ttft
from bench.peers.targets import Target
from bench.report import Spread

OURS = (*IN_PROCESS, MULL_GRPC)
MEANINGS = {True: "met", False: "missed", None: "not measured"}


def print_shape(console: Console, result: ShapeResult) -> None:
    table = Table(title=f"{result.shape}: medians (least…most)", title_justify="left")
    for heading in ("streams × prompt + out", "engine"):
        table.add_column(heading)
    for heading in ("tokens/s", *(f"{name} / it" for name in OURS), "first token, s", "ms a token"):
        table.add_column(heading, justify="right")
    for cell in result.cells:
        _add_cell(table, cell)
    console.print(table)
    console.print(_memory_table(result))
    for name, why in result.missing.items():
        console.print(f"[bold]{name}[/] could not run: {why}")


def _add_cell(table: Table, cell: CellResult) -> None:
    table.add_section()
    label = str(cell.cell)
    for name in ENGINES:
        if name in cell.failures:
            table.add_row(label, name, cell.failures[name])
        elif name in cell.figures:
            table.add_row(label, name, *_figures(cell, name))


def _figures(cell: CellResult, name: str) -> list[str]:
    ratios = [cell.ratio(ours, name, throughput) if name in PEERS else None for ours in OURS]
    return [
        _text(cell.spread(name, throughput)),
        *["" if it is None else f"{it.median:.2f}×" for it in ratios],
        _text(cell.spread(name, ttft)),
        _text(cell.spread(name, tpot), 1e3),
    ]


def _text(spread: Spread | None, factor: float = 1.0) -> str:
    if spread is None:
        return ""
    return f"{factor * spread.median:.4g} ({factor * spread.min:.3g}…{factor * spread.max:.3g})"


def _memory_table(result: ShapeResult) -> Table:
    table = Table()
    table.add_column("engine")
    for heading in ("resident MB", "largest process", "processes", "idle, % of a core", "greedy tokens as mull's"):
        table.add_column(heading, justify="right")
    for name, memory in result.memory.items():
        same = result.agreement.get(name)
        table.add_row(
            name,
            f"{memory.total_mb:,.0f}",
            f"{memory.largest_process_mb:,.0f}",
            str(memory.num_processes),
            f"{100 * result.idle_cpu[name]:.1f}",
            "" if same is None else f"{100 * same:.0f} %",
        )
    return table


def print_limits(console: Console, results: Iterable[ShapeResult]) -> None:
    limits = [it for result in results for cell in result.cells for it in cell.limits]
    if not limits:
        return
    read = Spread.of([it.read_gb_per_s for it in limits])
    gemm = Spread.of([it.fp32_gflop_per_s for it in limits])
    console.print(f"limits, measured before each cell: read {read} GB/s, fp32 GEMM {gemm} GFLOP/s")


def print_targets(console: Console, targets: Sequence[Target]) -> None:
    table = Table(title="Targets", title_justify="left")
    for heading in ("shape", "of", "what", "against", "target", "reached", ""):
        table.add_column(heading)
    for target in targets:
        sign = "≥" if target.at_least else "≤"
        reached = "" if target.reached is None else f"{target.reached:.2f}"
        bound = f"{sign} {target.bound:g}"
        table.add_row(target.shape, target.engine, target.what, target.against, bound, reached, MEANINGS[target.met])
    console.print(table)
