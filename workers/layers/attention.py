"""Self-attention of one layer on this rank's heads: fused QKV, QK-norm, RoPE, KV write, paged attention, output
projection.

T tokens, B sequences, H hidden, N local query heads, G local kv heads, D head_dim; X is some of the N + 2G heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.batch import BatchPart, Decodes, ForwardBatch, Prefills, SequenceEnds
from workers.config import ModelConfig, ShardSpec
from workers.kernels.cpu.halves import AttentionHalf, panels
from workers.kernels.decode_attention import decode_attention, decode_attention_for
from workers.kernels.linear import Rows, Weight, rows_of, unsummed_linear, vector
from workers.kernels.prefill_attention import prefill_attention
from workers.kernels.qk_norm_rope import heads_of
from workers.kernels.sums import Sums
from workers.kv_pool import KVPool


class Attention:
    """Holds one layer's attention weights. Its output is this rank's part of a sum over ranks."""

    def __init__(self, config: ModelConfig, spec: ShardSpec, layer: int, weights: dict[str, Weight]) -> None:
        self.layer = layer
        self.num_heads, num_kv_heads = spec.heads(config).size, spec.kv_heads(config).size
        self.eps = config.rms_norm_eps
        self.qkv, self.o = weights[f"layers.{layer}.qkv"], weights[f"layers.{layer}.o"]
        num_q_rows, num_rows = self.num_heads * config.head_dim, (self.num_heads + 2 * num_kv_heads) * config.head_dim
        self.q, self.kv = rows_of(self.qkv, 0, num_q_rows), rows_of(self.qkv, num_q_rows, num_rows)
        q_norm, k_norm = vector(weights, f"layers.{layer}.q_norm"), vector(weights, f"layers.{layer}.k_norm")
        # Each head of Q and K has its row of weights, so that one kernel takes all of them.
        self.norms_YD = torch.cat([q_norm.expand(self.num_heads, -1), k_norm.expand(num_kv_heads, -1)])

    def half(self, norm_H: Tensor) -> AttentionHalf | None:
        """All of it and the norm before it in one call, where it can be."""
        found = panels(self.qkv, self.o)
        return (
            None
            if found is None
            else AttentionHalf(norm_H, found[0], self.norms_YD, found[1], self.num_heads, self.eps)
        )

    def __call__(self, x_TH: Rows, batch: ForwardBatch, kv: KVPool) -> Sums:
        """Attend the batch's tokens to their sequences, and store their K and V."""
        product, pool = unsummed_linear(x_TH, self.qkv), kv.layers[self.layer]
        heads_TXD = heads_of(product, self.norms_YD, self.eps, batch.rotations_T2D, pool, batch.cells_T)
        q_TND, kv_TXD = heads_TXD[:, : self.num_heads], heads_TXD[:, self.num_heads :]
        return unsummed_linear(_attend(batch.parts, q_TND, kv_TXD, pool, self.o), self.o)

    def store(self, x_TH: Tensor, batch: ForwardBatch, kv: KVPool) -> None:
        """Store the K and V of the batch's tokens, and no more."""
        norms_GD, pool = self.norms_YD[self.num_heads :], kv.layers[self.layer]
        heads_of(unsummed_linear(x_TH, self.kv), norms_GD, self.eps, batch.rotations_T2D, pool, batch.cells_T)

    def attend_ends(self, x_BH: Tensor, ends: SequenceEnds, kv: KVPool) -> Sums:
        """Attend the last token of each sequence; everything up to it is stored."""
        product, norms_ND = unsummed_linear(x_BH, self.q), self.norms_YD[: self.num_heads]
        q_BND = heads_of(product, norms_ND, self.eps, ends.rotations_B2D, None, None)
        return unsummed_linear(decode_attention_for(q_BND, kv.layers[self.layer], ends.keys, self.o), self.o)


def _attend(parts: list[BatchPart], q_TND: Tensor, kv_TXD: Tensor, pool: Tensor, consumer: Weight) -> Rows:
    """[T, N * D], as the product with `consumer` reads it."""
    if len(parts) == 1 and isinstance(parts[0], Decodes):
        return decode_attention_for(q_TND[parts[0].rows], pool, parts[0].keys, consumer)
    outs = []
    for part in parts:
        if isinstance(part, Prefills):
            outs.append(prefill_attention(q_TND[part.rows], kv_TXD[part.rows], pool, part.chunks))
        else:
            outs.append(decode_attention(q_TND[part.rows], pool, part.keys))
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)
