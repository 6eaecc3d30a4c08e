"""Mixture of experts over all ranks of a copy: gate, dispatch, this rank's experts, combine.

Hop 8. Which way tokens travel is the dispatcher's business; where experts lie is the slot table's, which a rebalance
replaces between steps. T tokens, R rows computed here, H hidden, K chosen experts per token, e local slots, F ffn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.config import ModelConfig, ShardSpec
from workers.experts.dispatch import Dispatcher
from workers.experts.rows import RoutedRows
from workers.experts.slots import ReplicaTable, SlotLoads
from workers.kernels.cpu.halves import FeedForwardHalf, panels
from workers.kernels.gate import choose_experts, choose_slots
from workers.kernels.linear import Weight, linear, parts_of
from workers.kernels.moe import apply_experts
from workers.kernels.triton.rows import QuantizedRows
from workers.placement_map import initial_placement


class ExpertLayer:
    """Holds the gate and this rank's experts of one layer."""

    def __init__(self, config: ModelConfig, spec: ShardSpec, layer: int, weights: dict[str, Weight]) -> None:
        self.gate_EH = weights[f"layers.{layer}.gate"]
        self.gate_up_eXH = weights[f"layers.{layer}.experts.gate_up"]
        self.down_eHF = weights[f"layers.{layer}.experts.down"]
        self.num_experts, self.num_chosen = config.num_experts, config.num_experts_per_token
        self.is_normalized = config.norm_topk_prob
        self.local_slots = spec.expert_slots(config)
        self.is_alone = spec.layout.ep == 1
        """Nothing can be moved, so nothing is counted."""
        self.device = parts_of(self.gate_EH)[0].device
        self.loads = SlotLoads(self.local_slots.size, self.device)
        self.placement = initial_placement(config.num_experts, spec.redundant_experts, spec.layout.ep)
        self.table = ReplicaTable(self.placement, self.num_experts, self.device, can_change=not self.is_alone)

    def place(self, placement: list[int]) -> None:
        """Route by another placement from now on; the weights have been moved."""
        self.placement = placement
        self.table.place(placement)

    def half(self, norm_H: Tensor, eps: float) -> FeedForwardHalf | None:
        """All of it and the norm before it in one call, where it can be; only while `is_in_order`, on a lone rank."""
        found = panels(self.gate_EH, self.gate_up_eXH, self.down_eHF)
        if found is None:
            return None
        gate, gate_up, down = found
        return FeedForwardHalf(norm_H, gate_up, down, eps, gate, self.num_chosen, is_normalized=self.is_normalized)

    @property
    def is_in_order(self) -> bool:
        """Each expert lies in the slot of its own number."""
        return self.table.is_identity

    def __call__(self, x_TH: Tensor, quantized: QuantizedRows | None, dispatcher: Dispatcher[Any]) -> Tensor:
        """[T, H]: each token's experts, summed over all ranks. Every rank takes part, with tokens or without.

        `quantized`: x_TH as the experts' products read it, of use where tokens stay where they are.
        """
        rows, handle = dispatcher.dispatch(self.route(x_TH))
        return dispatcher.combine(self.apply(rows, quantized if rows.x_RH is x_TH else None), handle)

    def route(self, x_TH: Tensor) -> RoutedRows:
        """Each token's experts, as slots of ranks."""
        if not len(x_TH):
            return RoutedRows.none(x_TH, self.num_chosen)
        logits_TE = linear(x_TH, self.gate_EH)
        replicas, is_normalized = self.table.replicas, self.is_normalized
        if replicas is None:
            slots_TK, weights_TK = choose_experts(logits_TE, self.num_chosen, is_normalized=is_normalized)
        else:
            slots_TK, weights_TK = choose_slots(logits_TE, self.num_chosen, replicas, is_normalized=is_normalized)
        return RoutedRows(x_TH, slots_TK, weights_TK)

    def apply(self, rows: RoutedRows, quantized: QuantizedRows | None = None) -> Tensor:
        """This rank's partial sums, [R, H]. `quantized`: the same rows."""
        if not len(rows.x_RH):
            return torch.zeros_like(rows.x_RH)
        first, loads_e = self.local_slots.start, None if self.is_alone else self.loads.counts_e
        weights = self.gate_up_eXH, self.down_eHF
        return apply_experts(rows.x_RH, rows.slots_RK, rows.weights_RK, *weights, first, loads_e, quantized)
