"""The decoder of qwen3 and qwen3_moe: token ids in, this rank's logits out.

Hops 7 and 8. Knows batches and weights, not slots, plans or sampling. T tokens, B sampled rows, H hidden, v local
vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workers.batch import ForwardBatch
from workers.config import ModelConfig, ShardSpec
from workers.experts.choice import DispatcherChoice
from workers.experts.dispatch import Dispatcher
from workers.experts.layer import ExpertLayer
from workers.experts.traffic import DispatchTraffic
from workers.kernels.cpu.halves import LayerStack
from workers.kernels.linear import Weight, linear, vector
from workers.kernels.norm import add_rms_norm, add_rms_norm_both, add_rms_norm_for, rms_norm, rms_norm_for
from workers.kernels.sums import Sums, summed
from workers.kv_pool import KVPool
from workers.layers.attention import Attention
from workers.layers.embedding import Embedding
from workers.layers.mlp import DenseMLP
from workers.parallel import ParallelState


class DecoderLayer:
    """Attention, then a feed-forward layer, each added to the residual after a sum over ranks.

    On a CPU each of the two is one call where it can be.
    """

    def __init__(
        self, config: ModelConfig, spec: ShardSpec, layer: int, weights: dict[str, Weight], parallel: ParallelState
    ) -> None:
        self.tp, self.eps, self.layer = parallel.tp, config.rms_norm_eps, layer
        self.input_norm = vector(weights, f"layers.{layer}.input_norm")
        self.post_norm = vector(weights, f"layers.{layer}.post_norm")
        self.attention = Attention(config, spec, layer, weights)
        is_moe = config.is_moe_layer(layer)
        self.feed_forward = ExpertLayer(config, spec, layer, weights) if is_moe else DenseMLP(layer, weights)
        self.attention_half = self.attention.half(self.input_norm)
        needs_dispatch = is_moe and parallel.world_size > 1
        self.feed_forward_half = None if needs_dispatch else self.feed_forward.half(self.post_norm, self.eps)

    def __call__(
        self, x_TH: Tensor, delta_TH: Sums | None, batch: ForwardBatch, kv: KVPool, dispatcher: Dispatcher[Any]
    ) -> Sums:
        """Adds `delta_TH`, which the layer before has returned, to x_TH in place. Returns what is to be added next."""
        return self._feed_forward(x_TH, self._attend(x_TH, delta_TH, batch, kv), dispatcher)

    def last(
        self, x_TH: Tensor, delta_TH: Sums | None, batch: ForwardBatch, kv: KVPool, dispatcher: Dispatcher[Any]
    ) -> Tensor:
        """As the last layer: the sampled rows alone, x_BH. Later steps need only the KV of the others."""
        if batch.is_every_row_sampled:
            delta_TH = self(x_TH, delta_TH, batch, kv, dispatcher)
            return x_TH.add_(summed(delta_TH))
        if delta_TH is not None:
            x_TH += summed(delta_TH)
        if batch.scored_rows_S is not None:
            return self._last_scored(x_TH, batch, batch.scored_rows_S, kv, dispatcher)
        normed_TH = rms_norm(x_TH, self.input_norm, self.eps)
        self.attention.store(normed_TH, batch, kv)
        if batch.ends is None:
            self.assist(x_TH[:0], dispatcher)
            return x_TH[:0]
        rows_B = batch.ends.rows_B
        attended_BH = self.attention.attend_ends(normed_TH.index_select(0, rows_B), batch.ends, kv)
        x_BH = x_TH.index_select(0, rows_B)
        return x_BH.add_(summed(self._feed_forward(x_BH, attended_BH, dispatcher)))

    def _last_scored(
        self, x_TH: Tensor, batch: ForwardBatch, rows_S: Tensor, kv: KVPool, dispatcher: Dispatcher[Any]
    ) -> Tensor:
        """The sampled rows, which attend as they always do, and behind them those that score a prompt."""
        normed_TH = rms_norm(x_TH, self.input_norm, self.eps)
        attended_RH = summed(self.attention(normed_TH, batch, kv)).index_select(0, rows_S)
        rows_R = rows_S
        if batch.ends is not None:
            rows_B = batch.ends.rows_B
            attended_BH = summed(self.attention.attend_ends(normed_TH.index_select(0, rows_B), batch.ends, kv))
            rows_R, attended_RH = torch.cat([rows_B, rows_S]), torch.cat([attended_BH, attended_RH])
        x_RH = x_TH.index_select(0, rows_R)
        return x_RH.add_(summed(self._feed_forward(x_RH, attended_RH, dispatcher)))

    def to_experts(self, x_TH: Tensor, delta_TH: Sums | None, batch: ForwardBatch, kv: KVPool) -> Tensor:
        """Up to the gate: adds `delta_TH` and attention to x_TH in place. Returns what experts are chosen for."""
        attended_TH = self._over_ranks(self._attend(x_TH, delta_TH, batch, kv))
        return add_rms_norm(x_TH, attended_TH, self.post_norm, self.eps)

    def assist(self, x_0H: Tensor, dispatcher: Dispatcher[Any]) -> None:
        """Compute this rank's experts for the tokens of other groups: this one has none."""
        if isinstance(self.feed_forward, ExpertLayer):
            self.feed_forward(x_0H, None, dispatcher)

    def _attend(self, x_TH: Tensor, delta_TH: Sums | None, batch: ForwardBatch, kv: KVPool) -> Sums:
        """This rank's part of a sum over ranks."""
        if self.attention_half is not None and batch.step_rows is not None:
            whole_TH = None if delta_TH is None else summed(delta_TH)
            return self.attention_half(x_TH, whole_TH, batch.step_rows, kv.layers[self.layer])
        if delta_TH is None:
            rows = rms_norm_for(x_TH, self.input_norm, self.eps, self.attention.qkv)
        else:
            rows = add_rms_norm_for(x_TH, delta_TH, self.input_norm, self.eps, self.attention.qkv)
        return self.attention(rows, batch, kv)

    def _feed_forward(self, x_TH: Tensor, attended_TH: Sums, dispatcher: Dispatcher[Any]) -> Sums:
        """Adds the sum of `attended_TH` over ranks to x_TH in place. Returns what is to be added next."""
        attended_TH = self._over_ranks(attended_TH)
        if self.feed_forward_half is not None and self.feed_forward.is_in_order:
            return self.tp.all_reduce(self.feed_forward_half(x_TH, summed(attended_TH)))
        if isinstance(self.feed_forward, ExpertLayer):
            experts = self.feed_forward
            both = add_rms_norm_both(x_TH, attended_TH, self.post_norm, self.eps, experts.gate_up_eXH)
            return experts(*both, dispatcher)
        rows = add_rms_norm_for(x_TH, attended_TH, self.post_norm, self.eps, self.feed_forward.gate_up)
        return self._over_ranks(self.feed_forward(rows))

    def _over_ranks(self, product: Sums) -> Sums:
        """Its sum over ranks; of a lone one parts are left to the norm that reads them."""
        return product if self.tp.size == 1 else self.tp.all_reduce(summed(product))


class Decoder:
    """All layers of this rank."""

    def __init__(
        self,
        config: ModelConfig,
        spec: ShardSpec,
        weights: dict[str, Weight],
        parallel: ParallelState,
        choice: DispatcherChoice,
    ) -> None:
        self.eps, self.choice = config.rms_norm_eps, choice
        self.traffic = DispatchTraffic(parallel)
        self.norm = vector(weights, "norm")
        self.embedding = Embedding(weights["embed"], spec.vocab(config), parallel.tp, self.norm.dtype)
        self.layers = [DecoderLayer(config, spec, i, weights, parallel) for i in range(config.num_layers)]
        self.stack = self._stack(parallel)
        self.head_vH = weights["embed"] if config.tie_word_embeddings else weights["lm_head"]

    @property
    def expert_layers(self) -> list[ExpertLayer]:
        return [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, ExpertLayer)]

    def _stack(self, parallel: ParallelState) -> LayerStack | None:
        """All layers in one call: where this rank is alone and every half is a call."""
        halves = [
            (layer.attention_half, layer.feed_forward_half)
            for layer in self.layers
            if layer.attention_half is not None and layer.feed_forward_half is not None
        ]
        return LayerStack(halves) if parallel.world_size == 1 and len(halves) == len(self.layers) else None

    def forward(self, batch: ForwardBatch, kv: KVPool) -> Tensor:
        """Run the batch through the layers. Returns the sampled rows, x_BH, before the last norm; then the scored."""
        dispatcher = self._dispatcher(batch.group_tokens)
        if batch.is_padding_T1 is not None:
            dispatcher = self.choice.without(batch.is_padding_T1, dispatcher)
        x_TH = self.embedding(batch.token_ids_T)
        *others, last = self.layers
        delta_TH: Sums | None = None
        if (
            self.stack is not None
            and batch.step_rows is not None
            and all(layer.feed_forward.is_in_order for layer in self.layers)
        ):
            if batch.is_every_row_sampled:
                return x_TH.add_(self.stack(x_TH, batch.step_rows, kv.layers, len(self.layers)))
            if others:
                delta_TH = self.stack(x_TH, batch.step_rows, kv.layers, len(others))
        else:
            for layer in others:
                delta_TH = layer(x_TH, delta_TH, batch, kv, dispatcher)
        return last.last(x_TH, delta_TH, batch, kv, dispatcher)

    def assist(self, group_tokens: list[int]) -> None:
        """Take part in a step in which this group has no tokens, and others have."""
        dispatcher = self._dispatcher(group_tokens)
        for layer in self.layers:
            layer.assist(self.no_rows, dispatcher)

    @property
    def no_rows(self) -> Tensor:
        """[0, H]"""
        return self.norm.new_empty(0, len(self.norm))

    def uneven_dispatcher(self) -> Dispatcher[Any]:
        """For rows of any number in any group."""
        return self.traffic.metered(self.choice.over_tp(self.choice.all_to_all()))

    def _dispatcher(self, group_tokens: list[int]) -> Dispatcher[Any]:
        return self.traffic.metered(self.choice.for_step(group_tokens))

    def logits(self, x_BH: Tensor) -> Tensor:
        """fp32 logits of this rank's part of the vocabulary, [B, v]."""
        return linear(rms_norm(x_BH, self.norm, self.eps), self.head_vH).float()
