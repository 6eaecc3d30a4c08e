"""Causal attention of known tokens: of whole prompts, and of a chunk whose sequence began in earlier steps.

B sequences, C tokens of each, S tokens up to a chunk's end, N query heads, G kv heads, g queries per kv head, X the
2G heads of K, then of V, D head_dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from workers.kernels.paged import Blocks, read_blocks


def prompt_attention(q_TND: Tensor, kv_TXD: Tensor, num_seqs: int) -> Tensor:
    """Attend `num_seqs` sequences of equal length, all from position 0, to their own tokens. Returns [T, N, D]."""
    num_kv_heads = kv_TXD.shape[1] // 2
    q_BNCD = q_TND.view(num_seqs, -1, *q_TND.shape[1:]).transpose(1, 2)
    kv_BXCD = kv_TXD.view(num_seqs, -1, *kv_TXD.shape[1:]).transpose(1, 2)
    k_BGCD, v_BGCD = kv_BXCD[:, :num_kv_heads], kv_BXCD[:, num_kv_heads:]
    out_BNCD = F.scaled_dot_product_attention(q_BNCD, k_BGCD, v_BGCD, is_causal=True, enable_gqa=True)
    return out_BNCD.transpose(1, 2).flatten(0, 1)


def chunk_attention(q_CND: Tensor, pool: Tensor, blocks: Blocks, mask_CS: Tensor) -> Tensor:
    """Attend a chunk to the first S positions of its sequence's blocks, as the additive mask allows.

    The pool is [2G, num_blocks, block_size, D], K before V. Returns [C, N, D].
    """
    num_kv_heads, num_keys = pool.shape[0] // 2, mask_CS.shape[1]
    chunk_size, num_heads, head_dim = q_CND.shape
    group = num_heads // num_kv_heads
    kv_XgSD = read_blocks(pool, blocks).flatten(1, 2)[:, None, :num_keys].expand(-1, group, -1, -1)
    q_GgCD = q_CND.view(chunk_size, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    out_GgCD = F.scaled_dot_product_attention(q_GgCD, kv_XgSD[:num_kv_heads], kv_XgSD[num_kv_heads:], attn_mask=mask_CS)
    return out_GgCD.permute(2, 0, 1, 3).flatten(1, 2)
