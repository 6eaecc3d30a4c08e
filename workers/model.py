"""The decoder of qwen3 and qwen3_moe: token ids in, this rank's logits out.

Hops 7 and 8. Knows batches and weights, not slots, plans or sampling. T tokens, B sampled rows, H hidden, v local
vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from workers.batch import ForwardBatch
from workers.config import ModelConfig, ShardSpec
from workers.experts.layer import LocalExperts
from workers.kernels.linear import Weight, linear, vector
from workers.kernels.norm import add_rms_norm, rms_norm
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
        self.parallel, self.eps = parallel, config.rms_norm_eps
        self.input_norm = vector(weights, f"layers.{layer}.input_norm")
        self.post_norm = vector(weights, f"layers.{layer}.post_norm")
        self.attention = Attention(config, spec, layer, weights)
        is_moe = config.is_moe_layer(layer)
        self.feed_forward = LocalExperts(config, spec, layer, weights) if is_moe else DenseMLP(layer, weights)

    def __call__(self, x_TH: Tensor, batch: ForwardBatch, kv: KVPool) -> Tensor:
        """Returns x_TH, changed in place."""
        attended_TH = self.attention(rms_norm(x_TH, self.input_norm, self.eps), batch, kv)
        return self._feed_forward(x_TH, attended_TH)

    def last(self, x_TH: Tensor, batch: ForwardBatch, kv: KVPool) -> Tensor:
        """As the last layer: the sampled rows alone, x_BH. Later steps need only the KV of the others."""
        if not len(batch.sample_slots):
            self.attention.store(rms_norm(x_TH, self.input_norm, self.eps), batch, kv)
            return x_TH[:0]
        if batch.ends is None:
            return self(x_TH, batch, kv)
        normed_TH, rows_B = rms_norm(x_TH, self.input_norm, self.eps), batch.ends.rows_B
        self.attention.store(normed_TH, batch, kv)
        attended_BH = self.attention.attend_ends(normed_TH.index_select(0, rows_B), batch.ends, kv)
        return self._feed_forward(x_TH.index_select(0, rows_B), attended_BH)

    def _feed_forward(self, x_TH: Tensor, attended_TH: Tensor) -> Tensor:
        normed_TH = add_rms_norm(x_TH, self.parallel.all_reduce(attended_TH), self.post_norm, self.eps)
        x_TH += self.parallel.all_reduce(self.feed_forward(normed_TH))
        return x_TH


class Decoder:
    """All layers of this rank."""

    def __init__(
        self, config: ModelConfig, spec: ShardSpec, weights: dict[str, Weight], parallel: ParallelState
    ) -> None:
        self.eps = config.rms_norm_eps
        self.norm = vector(weights, "norm")
        self.embedding = Embedding(weights["embed"], spec.vocab(config), parallel, self.norm.dtype)
        self.layers = [DecoderLayer(config, spec, i, weights, parallel) for i in range(config.num_layers)]
        self.head_vH = weights["embed"] if config.tie_word_embeddings else weights["lm_head"]

    def forward(self, batch: ForwardBatch, kv: KVPool) -> Tensor:
        """Run the batch through the layers. Returns the sampled rows, x_BH, before the last norm."""
        x_TH = self.embedding(batch.token_ids_T)
        for layer in self.layers[:-1]:
            x_TH = layer(x_TH, batch, kv)
        return self.layers[-1].last(x_TH, batch, kv)

    def logits(self, x_BH: Tensor) -> Tensor:
        """fp32 logits of this rank's part of the vocabulary, [B, v]."""
        return linear(rms_norm(x_BH, self.norm, self.eps), self.head_vH).float()
