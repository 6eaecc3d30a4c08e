"""How level experts lie after one rebalance of a 94-layer, 128-expert model under Zipf routing.

    python -m bench.placement [--exponent 1.0] [--out FILE]

For each number of ranks: largest over mean load of ranks before (every expert once, in order), with replicas where
they lie at first, and after; the limit is 1. Then what a rebalance moves, and what the next one moves when loads have
changed by a tenth. Loads are expected token counts: no sampling noise.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from bench.report import Spread, machine, write
from cluster.router.placement import ExpertGrid, imbalance, num_moves, place_layer, rank_loads
from workers.placement_map import initial_placement, slots_per_rank

NUM_LAYERS, NUM_EXPERTS = 94, 128
CASES = ((8, 0, 1), (8, 16, 1), (8, 32, 1), (16, 32, 2), (32, 32, 4))
"""Ranks, redundant experts, nodes."""


def zipf(exponent: float, draw: random.Random) -> list[float]:
    loads = [1e6 / (place + 1) ** exponent for place in range(NUM_EXPERTS)]
    draw.shuffle(loads)
    return loads


def make_grid(num_ranks: int, redundant: int, num_nodes: int) -> ExpertGrid:
    return ExpertGrid(
        num_experts=NUM_EXPERTS,
        slots_per_rank=slots_per_rank(NUM_EXPERTS, redundant, num_ranks),
        nodes=tuple(rank * num_nodes // num_ranks for rank in range(num_ranks)),
    )


def measure(num_ranks: int, redundant: int, num_nodes: int, exponent: float) -> dict[str, Spread | float]:
    """Over layers: medians with their spread."""
    grid, plain = make_grid(num_ranks, redundant, num_nodes), make_grid(num_ranks, 0, num_nodes)
    once, first = initial_placement(NUM_EXPERTS, 0, num_ranks), initial_placement(NUM_EXPERTS, redundant, num_ranks)
    draw = random.Random(7)
    rows: list[tuple[float, ...]] = []
    for _ in range(NUM_LAYERS):
        loads = zipf(exponent, draw)
        started_s = time.perf_counter()
        placed = place_layer(grid, first, loads)
        took_ms = 1e3 * (time.perf_counter() - started_s)
        before = imbalance(rank_loads(plain, once, loads))
        after = imbalance(rank_loads(grid, placed, loads))
        again = place_layer(grid, placed, [load * draw.uniform(0.9, 1.1) for load in loads])
        moves = num_moves(grid, first, placed), num_moves(grid, placed, again)
        rows.append((before, imbalance(rank_loads(grid, first, loads)), after, before / after, *moves, took_ms))
    names = "before", "first", "after", "ratio", "moves", "moves_next", "layer_ms"
    return {name: Spread.of(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, object] = {"machine": machine(), "exponent": args.exponent}
    print(results["machine"])
    for num_ranks, redundant, num_nodes in CASES:
        name = f"{num_ranks} ranks on {num_nodes} nodes, {redundant} redundant experts"
        results[name] = figures = measure(num_ranks, redundant, num_nodes, args.exponent)
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
    write(args.out, results)


if __name__ == "__main__":
    run()
