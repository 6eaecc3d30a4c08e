"""Self-attention of one layer on this rank's heads: fused QKV, QK-norm, RoPE, KV write, paged attention, output
projection.

T tokens, B sequences, H hidden, N local query heads, G local kv heads, D head_dim; X is some of the N + 2G heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.batch import BatchPart, ForwardBatch, Prefills, SequenceEnds
from workers.config import ModelConfig, ShardSpec
from workers.kernels.cpu.halves import AttentionHalf, panels
from workers.kernels.decode_attention import decode_attention
from workers.kernels.linear import Rows, Weight, linear, rows_of, vector
from workers.kernels.prefill_attention import prefill_attention
from workers.kernels.qk_norm_rope import qk_norm_rope_store
from workers.kv_pool import KVPool


class Attention:
    """Holds one layer's attention weights. Its output is this rank's part of a sum over ranks."""

    def __init__(self, config: ModelConfig, spec: ShardSpec, layer: int, weights: dict[str, Weight]) -> None:
        self.layer = layer
        self.num_heads, num_kv_heads = spec.heads(config).size, spec.kv_heads(config).size
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        self.qkv, self.o = weights[f"layers.{layer}.qkv"], weights[f"layers.{layer}.o"]
        num_q_rows, num_rows = self.num_heads * self.head_dim, (self.num_heads + 2 * num_kv_heads) * self.head_dim
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

    def __call__(self, x_TH: Rows, batch: ForwardBatch, kv: KVPool) -> Tensor:
        """Attend the batch's tokens to their sequences, and store their K and V."""
        heads_TXD, pool = self._heads(x_TH, self.qkv), kv.layers[self.layer]
        qk_norm_rope_store(heads_TXD, self.norms_YD, self.eps, batch.rotations_T2D, pool, batch.cells_T)
        q_TND, kv_TXD = heads_TXD[:, : self.num_heads], heads_TXD[:, self.num_heads :]
        return linear(_attend(batch.parts, q_TND, kv_TXD, pool), self.o)

    def store(self, x_TH: Tensor, batch: ForwardBatch, kv: KVPool) -> None:
        """Store the K and V of the batch's tokens, and no more."""
        norms_GD, pool = self.norms_YD[self.num_heads :], kv.layers[self.layer]
        heads_TXD = self._heads(x_TH, self.kv)
        qk_norm_rope_store(heads_TXD, norms_GD, self.eps, batch.rotations_T2D, pool, batch.cells_T)

    def attend_ends(self, x_BH: Tensor, ends: SequenceEnds, kv: KVPool) -> Tensor:
        """Attend the last token of each sequence; everything up to it is stored."""
        q_BND = self._heads(x_BH, self.q)
        qk_norm_rope_store(q_BND, self.norms_YD[: self.num_heads], self.eps, ends.rotations_B2D, None, None)
        return linear(decode_attention(q_BND, kv.layers[self.layer], ends.keys).flatten(1), self.o)

    def _heads(self, x_TH: Rows, weight: Weight) -> Tensor:
        heads_TX = linear(x_TH, weight)
        return heads_TX.view(len(heads_TX), -1, self.head_dim)


def _attend(parts: list[BatchPart], q_TND: Tensor, kv_TXD: Tensor, pool: Tensor) -> Tensor:
    """[T, N * D]"""
    outs = []
    for part in parts:
        if isinstance(part, Prefills):
            outs.append(prefill_attention(q_TND[part.rows], kv_TXD[part.rows], pool, part.chunks))
        else:
            outs.append(decode_attention(q_TND[part.rows], pool, part.keys))
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)
