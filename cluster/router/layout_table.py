"""What each rank of a copy has to do, as rows of a table: for logs, `Describe` and `mull status`.

Pure: from the model's dimensions and the layout; what the ranks say of themselves is put beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.config import ModelConfig
from workers.layout import ParallelLayout, ShardSpec
from workers.placement_map import EMPTY_SLOT, initial_placement, slots_per_rank
from workers.step import RankReady

_HEAD = ("rank", "group", "host", "device", "heads", "experts", "weights MiB", "KV MiB", "KV tokens")


@dataclass(frozen=True, kw_only=True)
class RankRole:
    """One rank's part of the model."""

    rank: int
    group: int
    """Its attention group."""
    num_heads: int
    num_kv_heads: int
    num_experts: int
    """Physical experts in every layer that has any, replicas counted, before the first rebalance."""


def rank_roles(model: ModelConfig, layout: ParallelLayout, redundant_experts: int) -> list[RankRole]:
    """Every rank's, in order. The layout must suit the model."""
    experts = _experts_per_place(model, layout, redundant_experts)
    specs = [ShardSpec(layout, rank) for rank in range(layout.world_size)]
    return [
        RankRole(
            rank=spec.rank,
            group=spec.rank // layout.tp,
            num_heads=spec.heads(model).size,
            num_kv_heads=spec.kv_heads(model).size,
            num_experts=experts[spec.rank // layout.expert_tp],
        )
        for spec in specs
    ]


def _experts_per_place(model: ModelConfig, layout: ParallelLayout, redundant: int) -> list[int]:
    if not model.has_moe_layers:
        return [0] * layout.ep
    slots = initial_placement(model.num_experts, redundant, layout.ep)
    size = slots_per_rank(model.num_experts, redundant, layout.ep)
    return [size - slots[place * size : (place + 1) * size].count(EMPTY_SLOT) for place in range(layout.ep)]


def table_lines(roles: Sequence[RankRole], ranks: Sequence[RankReady]) -> list[str]:
    """A head and a line per rank, in columns."""
    rows = [_HEAD, *(_cells(role, rank) for role, rank in zip(roles, ranks, strict=True))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _cells(role: RankRole, rank: RankReady) -> tuple[str, ...]:
    return (
        str(role.rank),
        str(role.group),
        rank.host,
        rank.device,
        f"{role.num_heads}/{role.num_kv_heads}",
        str(role.num_experts),
        f"{rank.weight_bytes / 2**20:.1f}",
        f"{rank.kv_bytes / 2**20:.1f}",
        f"{rank.num_blocks * rank.block_size:,}",
    )
