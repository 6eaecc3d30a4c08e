"""How uneven experts make the ranks, as the production placement leaves it."""

from __future__ import annotations

import random
import statistics

from cluster.router.placement import ExpertGrid, imbalance, place_layer, rank_loads
from workers.config import ModelConfig
from workers.layout import ParallelLayout
from workers.placement_map import initial_placement, slots_per_rank

_LAYERS_LOOKED_AT = 8


def expert_imbalance(model: ModelConfig, layout: ParallelLayout, *, redundant: int, skew: float) -> float:
    """Largest over mean load of expert places, when tokens prefer experts by Zipf's law with this exponent.

    0: all are asked alike. The mean of a few layers, each placed by `place_layer` as a rebalance does it.
    """
    if not model.has_moe_layers or layout.ep == 1 or skew == 0:
        return 1.0
    draw = random.Random(0)
    grid = ExpertGrid(
        num_experts=model.num_experts,
        slots_per_rank=slots_per_rank(model.num_experts, redundant, layout.ep),
        nodes=(0,) * layout.ep,
    )
    first = initial_placement(model.num_experts, redundant, layout.ep)
    found = []
    for _ in range(_LAYERS_LOOKED_AT):
        loads = [(rank + 1) ** -skew for rank in range(model.num_experts)]
        draw.shuffle(loads)
        found.append(imbalance(rank_loads(grid, place_layer(grid, first, loads), loads)))
    return statistics.mean(found)
