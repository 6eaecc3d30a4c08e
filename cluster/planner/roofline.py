"""How long a step takes on accelerators: for each part the larger of bytes over bandwidth and operations over peak.

The floor takes the hardware's peaks and nothing else; the estimate takes what kernels reach of them, and adds
collectives, launches and the way to the ranks. All of a copy's groups step together: dense layers and attention last as
long as in the fullest group, experts see the tokens of all.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from cluster.planner.devices import Device, Kernels
from cluster.planner.rank_work import RankWork
from cluster.planner.step_shape import ENDLESS, GroupShape, StepShape
from workers.config import ModelConfig
from workers.layout import ParallelLayout

_EXPERT_ROW_TILE = 16
"""Rows of an expert are computed in tiles of so many."""
_ACTIVATION_BYTES = 2


class StepTime(NamedTuple):
    """The parts of a step, in seconds."""

    dense_s: float = 0.0
    experts_s: float = 0.0
    attention_s: float = 0.0
    """Decodes that read KV."""
    prefill_attention_s: float = 0.0
    collectives_s: float = 0.0
    overhead_s: float = 0.0

    @property
    def total_s(self) -> float:
        return (
            self.dense_s
            + self.experts_s
            + self.attention_s
            + self.prefill_attention_s
            + self.collectives_s
            + self.overhead_s
        )

    def later(self, more_s: float) -> StepTime:
        """The same with so much more for KV that is read."""
        return StepTime(
            dense_s=self.dense_s,
            experts_s=self.experts_s,
            attention_s=self.attention_s + more_s,
            prefill_attention_s=self.prefill_attention_s,
            collectives_s=self.collectives_s,
            overhead_s=self.overhead_s,
        )

    def plus(self, other: StepTime, times: float) -> StepTime:
        """The sum of this and so many of the other."""
        return StepTime(
            dense_s=self.dense_s + times * other.dense_s,
            experts_s=self.experts_s + times * other.experts_s,
            attention_s=self.attention_s + times * other.attention_s,
            prefill_attention_s=self.prefill_attention_s + times * other.prefill_attention_s,
            collectives_s=self.collectives_s + times * other.collectives_s,
            overhead_s=self.overhead_s + times * other.overhead_s,
        )

    @property
    def limit(self) -> str:
        """What most of the time goes to."""
        _, name = max((seconds, name) for name, seconds in self._asdict().items())
        return name.removesuffix("_s").replace("_", " ")


FLOOR = Kernels(
    weight_share=1.0,
    attention_share=1.0,
    single_attention_share=1.0,
    gemm_share=1.0,
    expert_gemm_tflop_s=inf,
    prefill_attention_share=1.0,
    layer_overhead_us=0.0,
    step_overhead_us=0.0,
    collective_latency_us=0.0,
    network_latency_us=0.0,
    collective_share=1.0,
)
"""Kernels without loss."""


class Roofline:
    """The step times of one copy of a model in one layout on one kind of device."""

    def __init__(
        self,
        model: ModelConfig,
        layout: ParallelLayout,
        work: RankWork,
        device: Device,
        kernels: Kernels,
        *,
        imbalance: float = 1.0,
    ) -> None:
        """`imbalance`: largest over mean load of ranks, of expert work in large batches."""
        self._model, self._layout, self._work = model, layout, work
        self._kernels = kernels
        self._imbalance = imbalance
        self._bandwidth = device.bandwidth_gb_s * 1e9
        # Weights that are not FP8 are computed in bf16.
        self._gemm_peak = (device.fp8_tflop_s if model.quantization else device.bf16_tflop_s) * 1e12
        self._bf16_peak = device.bf16_tflop_s * 1e12
        crosses_nodes = layout.world_size > device.ranks_per_node
        self._dispatch_gb_s = device.network_gb_s if crosses_nodes else device.link_gb_s
        self._dispatch_latency_us = kernels.network_latency_us if crosses_nodes else kernels.collective_latency_us
        flops = 4 * work.num_heads * model.head_dim * model.num_layers
        self._pair_s = flops / (self._bf16_peak * kernels.prefill_attention_share)
        self._rest: dict[tuple[int, int, int], tuple[float, float, float, float]] = {}
        self._link_gb_s = device.link_gb_s if layout.tp <= device.ranks_per_node else device.network_gb_s

    def step(self, shape: StepShape) -> StepTime:
        """The parts of a step of this shape."""
        num_tokens = [group.num_decodes + group.prefill_tokens for group in shape]
        num_sampled = max([group.num_decodes + group.num_prefills for group in shape])
        known = (max(num_tokens), sum(num_tokens), num_sampled)
        rest = self._rest.get(known)
        if rest is None:
            rest = self._rest[known] = self._without_context(*known)
        pairs = max([group.prefill_pairs for group in shape])
        dense_s, experts_s, collectives_s, overhead_s = rest
        return StepTime(
            dense_s=dense_s,
            experts_s=experts_s,
            attention_s=max([self.context_s(group) for group in shape]),
            prefill_attention_s=pairs * self._pair_s,
            collectives_s=collectives_s,
            overhead_s=overhead_s,
        )

    def _without_context(self, most: int, total: int, num_sampled: int) -> tuple[float, float, float, float]:
        """Of so many tokens in the fullest group, and in all of them: what contexts have no part in."""
        return (
            self._dense_s(most, num_sampled),
            self._experts_s(total),
            self._collectives_s(most, total),
            self._overhead_s(),
        )

    def context_s(self, group: GroupShape) -> float:
        """Of decodes of one group that read KV: of many sequences at a larger share of the bandwidth than of one."""
        if not group.num_decodes:
            return 0.0
        kernels = self._kernels
        share = kernels.attention_share
        share -= (share - kernels.single_attention_share) / group.num_decodes
        return group.decode_context * self._work.kv_token_bytes / (self._bandwidth * share)

    def growth(self, group: GroupShape) -> tuple[float, int]:
        """The same for ever: context is read at one bandwidth."""
        return self.context_s(GroupShape(group.num_decodes, group.num_decodes)), ENDLESS

    def _dense_s(self, num_tokens: int, num_sampled: int) -> float:
        work, kernels = self._work, self._kernels
        read_s = work.dense_bytes / (self._bandwidth * kernels.weight_share)
        compute_s = 2 * work.dense_params * num_tokens / (self._gemm_peak * kernels.gemm_share)
        head_s = 2 * work.head_params * num_sampled / (self._bf16_peak * kernels.gemm_share)
        return max(read_s, compute_s + head_s)

    def _experts_s(self, num_tokens: int) -> float:
        model, work, kernels = self._model, self._work, self._kernels
        if not work.num_moe_layers or not num_tokens:
            return 0.0
        places = self._layout.ep
        share = model.num_experts_per_token / model.num_experts
        touched = 1 - (1 - share) ** num_tokens
        # Of few tokens, the fullest of several ranks has more experts than the mean, but not more than it holds.
        busy = min(work.num_local_experts, self._fullest(work.num_local_experts * touched, places))
        rows = num_tokens * model.num_experts_per_token / places * (self._imbalance if places > 1 else 1.0)
        read_s = busy * work.expert_bytes / (self._bandwidth * kernels.weight_share)
        dense_rate = self._gemm_peak * kernels.gemm_share
        rate = min(kernels.expert_gemm_tflop_s * 1e12, dense_rate)
        compute_s = 2 * work.expert_params * max(rows / rate, busy * _EXPERT_ROW_TILE / dense_rate)
        return work.num_moe_layers * max(read_s, compute_s)

    @staticmethod
    def _fullest(mean: float, places: int) -> float:
        """The largest of `places` counts with this mean: about two deviations of a Poisson count above it, where
        there are several."""
        return mean if places == 1 else mean + min(2.0, 0.5 * places**0.5) * mean**0.5

    def _collectives_s(self, most_tokens: int, all_tokens: int) -> float:
        layout, model = self._layout, self._model
        if layout.world_size == 1:
            return 0.0
        moe = self._work.num_moe_layers
        reduces = (model.num_layers + model.num_layers - moe) if layout.tp > 1 else 0
        seconds = reduces * self._all_reduce_s(most_tokens, layout.tp, self._link_gb_s, is_near=True)
        if layout.dp == 1:
            return seconds + moe * self._all_reduce_s(all_tokens, layout.world_size, self._dispatch_gb_s, is_near=False)
        return seconds + moe * self._exchange_s(all_tokens)

    def _all_reduce_s(self, num_tokens: int, ranks: int, gb_s: float, *, is_near: bool) -> float:
        latency_us = self._kernels.collective_latency_us if is_near else self._dispatch_latency_us
        moved = 2 * (ranks - 1) / ranks * num_tokens * self._model.hidden_size * _ACTIVATION_BYTES
        return latency_us * 1e-6 + moved / (gb_s * 1e9 * self._kernels.collective_share)

    def _exchange_s(self, num_tokens: int) -> float:
        """Dispatch and combine of one layer: all-gather and reduce-scatter over all ranks."""
        world = self._layout.world_size
        row = self._model.hidden_size * _ACTIVATION_BYTES
        moved = 2 * (world - 1) / world * num_tokens * row
        return 2e-6 * self._dispatch_latency_us + moved / (self._dispatch_gb_s * 1e9 * self._kernels.collective_share)

    def _overhead_s(self) -> float:
        kernels = self._kernels
        return (kernels.step_overhead_us + kernels.layer_overhead_us * self._model.num_layers) * 1e-6
