"""Self-attention of one layer on this rank's heads: fused QKV, QK-norm, RoPE, KV write, paged attention, output
projection.

T tokens, B sequences, H hidden, N local query heads, G local kv heads, D head_dim; X is some of the N + 2G heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.batch import BatchPart, DecodeGroup, ForwardBatch, PrefillChunk, Prompts, Rotations, SequenceEnds
from workers.config import ModelConfig, ShardSpec
from workers.kernels.decode_attention import decode_attention
from workers.kernels.linear import linear
from workers.kernels.norm import rms_norm
from workers.kernels.prefill_attention import chunk_attention, prompt_attention
from workers.kernels.rope import rotate_into
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
        qkv_TXD = linear(x_TH, self.qkv).view(len(x_TH), -1, self.head_dim)
        self._norm_and_rotate(qkv_TXD[:, : len(self.qk_norm_XD)], self.qk_norm_XD, batch.rotations)
        q_TND, kv_TXD = qkv_TXD[:, : self.num_heads], qkv_TXD[:, self.num_heads :]
        kv.write(self.layer, batch.cells_T, kv_TXD)
        return linear(_attend(batch.parts, q_TND, kv_TXD, kv.layers[self.layer]), self.o)

    def store(self, x_TH: Tensor, batch: ForwardBatch, kv: KVPool) -> None:
        """Store the K and V of the batch's tokens, and no more."""
        kv_TXD = linear(x_TH, self.qkv[self.num_heads * self.head_dim :]).view(len(x_TH), -1, self.head_dim)
        k_norm_XD = self.qk_norm_XD[self.num_heads :]
        self._norm_and_rotate(kv_TXD[:, : len(k_norm_XD)], k_norm_XD, batch.rotations)
        kv.write(self.layer, batch.cells_T, kv_TXD)

    def attend_ends(self, x_BH: Tensor, ends: SequenceEnds, kv: KVPool) -> Tensor:
        """Attend the last token of each sequence; everything up to it is stored."""
        q_BND = linear(x_BH, self.qkv[: self.num_heads * self.head_dim]).view(len(x_BH), -1, self.head_dim)
        self._norm_and_rotate(q_BND, self.qk_norm_XD[: self.num_heads], ends.rotations)
        outs = [_decode(group, q_BND, kv.layers[self.layer]) for group in ends.groups]
        return linear(_joined(outs), self.o)

    def _norm_and_rotate(self, heads_TXD: Tensor, norm_XD: Tensor, rotations: Rotations) -> None:
        """In place."""
        normed_TXD = rms_norm(heads_TXD, norm_XD, self.eps)
        rotate_into(heads_TXD, normed_TXD, rotations.cos_T1D, rotations.signed_sin_T1D)


def _attend(parts: list[BatchPart], q_TND: Tensor, kv_TXD: Tensor, pool: Tensor) -> Tensor:
    outs = []
    for part in parts:
        if isinstance(part, Prompts):
            outs.append(prompt_attention(q_TND[part.rows], kv_TXD[part.rows], part.num_seqs))
        elif isinstance(part, PrefillChunk):
            outs.append(chunk_attention(q_TND[part.rows], pool, part.blocks, part.mask_CS))
        else:
            outs.append(_decode(part, q_TND, pool))
    return _joined(outs)


def _decode(group: DecodeGroup, q_TND: Tensor, pool: Tensor) -> Tensor:
    return decode_attention(q_TND[group.rows], pool, group.blocks, group.num_keys, group.mask_B1S)


def _joined(outs: list[Tensor]) -> Tensor:
    """[T, N * D]"""
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1)
