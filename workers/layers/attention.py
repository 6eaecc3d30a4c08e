"""Self-attention of one layer on this rank's heads: fused QKV, QK-norm, RoPE, KV write, paged attention, output
projection.

T tokens, H hidden, N local query heads, G local kv heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.batch import ForwardBatch
from workers.config import ModelConfig, ShardSpec
from workers.kernels.decode_attention import decode_attention
from workers.kernels.linear import linear
from workers.kernels.norm import rms_norm
from workers.kernels.prefill_attention import prefill_attention
from workers.kernels.rope import rotate
from workers.kv_pool import KVPool


class Attention:
    """Holds one layer's attention weights. Its output is this rank's part of a sum over ranks."""

    def __init__(self, config: ModelConfig, spec: ShardSpec, layer: int, weights: dict[str, Tensor]) -> None:
        self.layer = layer
        self.num_heads, self.num_kv_heads = spec.heads(config).size, spec.kv_heads(config).size
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        self.qkv, self.o = weights[f"layers.{layer}.qkv"], weights[f"layers.{layer}.o"]
        q_norm, k_norm = weights[f"layers.{layer}.q_norm"], weights[f"layers.{layer}.k_norm"]
        # One norm for the heads of Q and K together: each head has its row of weights.
        self.qk_norm_XD = torch.cat([q_norm.expand(self.num_heads, -1), k_norm.expand(self.num_kv_heads, -1)])

    def __call__(self, x_TH: Tensor, batch: ForwardBatch, kv: KVPool) -> Tensor:
        """Attend the batch's tokens to their sequences, and store their K and V."""
        qkv_TXD = linear(x_TH, self.qkv).view(x_TH.shape[0], -1, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        normed_TXD = rms_norm(qkv_TXD[:, :num_rotated], self.qk_norm_XD, self.eps)
        rotated_TXD = rotate(normed_TXD, batch.cos_T1D, batch.signed_sin_T1D)
        kv.write(self.layer, batch.cells_T, rotated_TXD[:, self.num_heads :], qkv_TXD[:, num_rotated:])
        out_TND = self._attend(rotated_TXD[:, : self.num_heads], batch, kv)
        return linear(out_TND.view(x_TH.shape[0], -1), self.o)

    def _attend(self, q_TND: Tensor, batch: ForwardBatch, kv: KVPool) -> Tensor:
        k, v = kv.k[self.layer], kv.v[self.layer]
        outs = [
            prefill_attention(q_TND[c.first : c.first + c.size], k, v, c.block_ids, c.num_keys, c.mask_CS)
            for c in batch.chunks
        ]
        outs += [
            decode_attention(q_TND[g.first : g.first + g.size], k, v, g.block_ids, g.mask_B11S) for g in batch.decodes
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)
