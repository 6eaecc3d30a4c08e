"""Mixture of experts where every rank has all tokens (dp = 1): the gate runs everywhere, each rank computes its own
experts.

Hop 8. Nothing is dispatched; the sum over ranks, which the decoder does for every feed-forward layer, combines.
"""

from __future__ import annotations

from torch import Tensor

from workers.config import ModelConfig, ShardSpec
from workers.kernels.gate import choose_experts
from workers.kernels.linear import Weight, linear
from workers.kernels.moe import apply_experts


class LocalExperts:
    """Holds the gate and this rank's whole experts of one layer. Its output is this rank's part of a sum over ranks."""

    def __init__(self, config: ModelConfig, spec: ShardSpec, layer: int, weights: dict[str, Weight]) -> None:
        self.gate_EH = weights[f"layers.{layer}.gate"]
        self.gate_up_eXH = weights[f"layers.{layer}.experts.gate_up"]
        self.down_eHF = weights[f"layers.{layer}.experts.down"]
        self.first_expert = spec.experts(config).start
        self.num_chosen = config.num_experts_per_token
        self.is_normalized = config.norm_topk_prob

    def __call__(self, x_TH: Tensor) -> Tensor:
        topk_ids_TK, weights_TK = choose_experts(
            linear(x_TH, self.gate_EH), self.num_chosen, is_normalized=self.is_normalized
        )
        return apply_experts(x_TH, topk_ids_TK, weights_TK, self.gate_up_eXH, self.down_eHF, self.first_expert)
