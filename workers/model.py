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
from workers.kernels.linear import Weight, linear, vector
from workers.kernels.norm import add_rms_norm, add_rms_norm_for, rms_norm, rms_norm_for
from workers.kv_pool import KVPool
from workers.layers.attention import Attention
from workers.layers.embedding import Embedding
from workers.layers.mlp import DenseMLP
from workers.parallel import ParallelState


class DecoderLayer:
    """Attention, then a feed-forward layer, each added to the residual after a sum over ranks."""

    def __init__(
        self, config: ModelConfig, spec: ShardSpec, layer: int, weights: dict[str, Weight], parallel: ParallelState
    ) -> None:
        self.tp, self.eps = parallel.tp, config.rms_norm_eps
        self.input_norm = vector(weights, f"layers.{layer}.input_norm")
        self.post_norm = vector(weights, f"layers.{layer}.post_norm")
        self.attention = Attention(config, spec, layer, weights)
        is_moe = config.is_moe_layer(layer)
        self.feed_forward = ExpertLayer(config, spec, layer, weights) if is_moe else DenseMLP(layer, weights)

    def __call__(self, x_TH: Tensor, batch: ForwardBatch, kv: KVPool, dispatcher: Dispatcher[Any]) -> Tensor:
        """Returns x_TH, changed in place."""
        normed_TH = rms_norm_for(x_TH, self.input_norm, self.eps, self.attention.qkv)
        attended_TH = self.attention(normed_TH, batch, kv)
        return self._feed_forward(x_TH, attended_TH, dispatcher)

    def last(self, x_TH: Tensor, batch: ForwardBatch, kv: KVPool, dispatcher: Dispatcher[Any]) -> Tensor:
        """As the last layer: the sampled rows alone, x_BH. Later steps need only the KV of the others."""
        if batch.scored_rows_S is not None:
            return self._last_scored(x_TH, batch, batch.scored_rows_S, kv, dispatcher)
        if not len(batch.sample_slots):
            self.attention.store(rms_norm(x_TH, self.input_norm, self.eps), batch, kv)
            self.assist(x_TH[:0], dispatcher)
            return x_TH[:0]
        if batch.ends is None:
            return self(x_TH, batch, kv, dispatcher)
        normed_TH, rows_B = rms_norm(x_TH, self.input_norm, self.eps), batch.ends.rows_B
        self.attention.store(normed_TH, batch, kv)
        attended_BH = self.attention.attend_ends(normed_TH.index_select(0, rows_B), batch.ends, kv)
        return self._feed_forward(x_TH.index_select(0, rows_B), attended_BH, dispatcher)

    def _last_scored(
        self, x_TH: Tensor, batch: ForwardBatch, rows_S: Tensor, kv: KVPool, dispatcher: Dispatcher[Any]
    ) -> Tensor:
        """The sampled rows, which attend as they always do, and behind them those that score a prompt."""
        normed_TH = rms_norm(x_TH, self.input_norm, self.eps)
        attended_SH = self.attention(normed_TH, batch, kv).index_select(0, rows_S)
        if batch.ends is None:
            return self._feed_forward(x_TH.index_select(0, rows_S), attended_SH, dispatcher)
        rows_B = batch.ends.rows_B
        attended_BH = self.attention.attend_ends(normed_TH.index_select(0, rows_B), batch.ends, kv)
        rows_R = torch.cat([rows_B, rows_S])
        return self._feed_forward(x_TH.index_select(0, rows_R), torch.cat([attended_BH, attended_SH]), dispatcher)

    def assist(self, x_0H: Tensor, dispatcher: Dispatcher[Any]) -> None:
        """Compute this rank's experts for the tokens of other groups: this one has none."""
        if isinstance(self.feed_forward, ExpertLayer):
            self.feed_forward(x_0H, dispatcher)

    def _feed_forward(self, x_TH: Tensor, attended_TH: Tensor, dispatcher: Dispatcher[Any]) -> Tensor:
        attended_TH = self.tp.all_reduce(attended_TH)
        if isinstance(self.feed_forward, ExpertLayer):
            x_TH += self.feed_forward(add_rms_norm(x_TH, attended_TH, self.post_norm, self.eps), dispatcher)
        else:
            consumer = self.feed_forward.gate_up
            rows = add_rms_norm_for(x_TH, attended_TH, self.post_norm, self.eps, consumer)
            x_TH += self.tp.all_reduce(self.feed_forward(rows))
        return x_TH


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
        self.head_vH = weights["embed"] if config.tie_word_embeddings else weights["lm_head"]

    @property
    def expert_layers(self) -> list[ExpertLayer]:
        return [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, ExpertLayer)]

    def forward(self, batch: ForwardBatch, kv: KVPool) -> Tensor:
        """Run the batch through the layers. Returns the sampled rows, x_BH, before the last norm; then the scored."""
        dispatcher = self._dispatcher(batch.group_tokens)
        x_TH = self.embedding(batch.token_ids_T)
        for layer in self.layers[:-1]:
            x_TH = layer(x_TH, batch, kv, dispatcher)
        return self.layers[-1].last(x_TH, batch, kv, dispatcher)

    def assist(self, group_tokens: list[int]) -> None:
        """Take part in a step in which this group has no tokens, and others have."""
        dispatcher, x_0H = self._dispatcher(group_tokens), self.norm.new_empty(0, len(self.norm))
        for layer in self.layers:
            layer.assist(x_0H, dispatcher)

    def _dispatcher(self, group_tokens: list[int]) -> Dispatcher[Any]:
        return self.traffic.metered(self.choice.for_step(group_tokens))

    def logits(self, x_BH: Tensor) -> Tensor:
        """fp32 logits of this rank's part of the vocabulary, [B, v]."""
        return linear(rms_norm(x_BH, self.norm, self.eps), self.head_vH).float()
