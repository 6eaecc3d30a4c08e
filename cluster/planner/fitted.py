"""Step times of ranks that were measured: a sum of what a step does, each kind at a cost that was fitted to live runs.

For CPUs, whose peaks say little of what a step takes. The kinds are physical (bytes, operations, rows), so that costs
that were fitted at some loads hold for others of the same model on the same machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cluster.planner.rank_work import RankWork
from cluster.planner.roofline import StepTime
from cluster.planner.step_shape import ENDLESS, GroupShape, StepShape
from workers.config import ModelConfig
from workers.layout import ParallelLayout

CACHED_BYTES = 4 * 2**20
"""Of KV, what a core still has of the step before in its caches: its share of a server's last one, 32 MiB of eight."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of one of each."""

    step: float = 0.0
    weight_byte: float = 0.0
    """Read once a step, for however many rows."""
    decode_flop: float = 0.0
    prefill_flop: float = 0.0
    kv_byte: float = 0.0
    """Read by decodes, beyond what is in the core's caches."""
    attention_flop: float = 0.0
    """Of prefills."""
    row: float = 0.0
    """A token that is sampled."""

    def as_json(self) -> dict[str, Any]:
        """With where they come from."""
        return {name: {"value": getattr(self, name), "source": "fitted to live runs"} for name in self.names()}

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]


class FittedCost:
    """One rank that computes everything; the layout must be tp=1."""

    def __init__(self, model: ModelConfig, layout: ParallelLayout, work: RankWork, costs: Costs) -> None:
        assert layout.world_size == 1, "costs were fitted to one rank"
        self._model, self._work, self._costs = model, work, costs

    def amounts(self, group: GroupShape) -> Mapping[str, float]:
        """What a step of this shape does, by the names of Costs."""
        model, work = self._model, self._work
        num_tokens, num_sampled = group.num_tokens, group.num_decodes + group.num_prefills
        weights, flops = float(work.dense_bytes), 2.0 * work.dense_params
        if work.num_moe_layers:
            share = model.num_experts_per_token / model.num_experts
            touched = model.num_experts * (1 - (1 - share) ** num_tokens)
            weights += work.num_moe_layers * touched * work.expert_bytes
            flops += 2.0 * work.num_moe_layers * model.num_experts_per_token * work.expert_params
        head = 2.0 * work.head_params
        prefill_flops = group.prefill_tokens * flops + group.num_prefills * head
        attention = 4.0 * work.num_heads * model.head_dim * model.num_layers * group.prefill_pairs
        return {
            "step": 1.0,
            "weight_byte": weights,
            "decode_flop": group.num_decodes * (flops + head),
            "prefill_flop": prefill_flops,
            "kv_byte": self._far_bytes(group),
            "attention_flop": attention,
            "row": float(num_sampled),
        }

    def step(self, shape: StepShape) -> StepTime:
        """The parts of a step of this shape."""
        (group,) = shape
        amounts, costs = self.amounts(group), self._costs
        return StepTime(
            dense_s=amounts["weight_byte"] * costs.weight_byte
            + amounts["decode_flop"] * costs.decode_flop
            + amounts["prefill_flop"] * costs.prefill_flop,
            attention_s=amounts["kv_byte"] * costs.kv_byte,
            prefill_attention_s=amounts["attention_flop"] * costs.attention_flop,
            overhead_s=costs.step + amounts["row"] * costs.row,
        )

    def context_s(self, group: GroupShape) -> float:
        """Of the only group."""
        return self._far_bytes(group) * self._costs.kv_byte

    def growth(self, group: GroupShape) -> tuple[float, int]:
        """Nothing for as long as its KV is in caches."""
        more_bytes = group.num_decodes * self._work.kv_token_bytes
        near_bytes = CACHED_BYTES - group.decode_context * self._work.kv_token_bytes
        if near_bytes > 0:
            return 0.0, near_bytes // more_bytes
        return more_bytes * self._costs.kv_byte, ENDLESS

    def _far_bytes(self, group: GroupShape) -> float:
        return float(max(0, group.decode_context * self._work.kv_token_bytes - CACHED_BYTES))
