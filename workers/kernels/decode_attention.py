"""Attention of one new token per sequence over its paged KV.

B sequences, N query heads, G kv heads, g queries per kv head, D head_dim, S keys of the longest sequence.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from workers.kernels.paged import Blocks, read_blocks


def decode_attention(q_BND: Tensor, pool: Tensor, blocks: Blocks, num_keys: int, mask_B1S: Tensor | None) -> Tensor:
    """Attend each query to its own blocks. Returns [B, N, D].

    The pool is [2G, num_blocks, block_size, D], K before V; `blocks` are every sequence's one after another, padded to
    those of `num_keys`, the longest; the additive mask hides what lies behind a sequence's end. Queries of a group ride
    as rows of one product, so no KV head is copied; kv heads take the batch's place and sequences that of the heads, so
    that the blocks read need no other order.
    """
    num_seqs, num_heads, head_dim = q_BND.shape
    num_kv_heads = pool.shape[0] // 2
    kv_GBSD = read_blocks(pool, blocks).view(2 * num_kv_heads, num_seqs, -1, head_dim)[:, :, :num_keys]
    q_GBgD = q_BND.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(0, 1)
    out_GBgD = F.scaled_dot_product_attention(
        q_GBgD, kv_GBSD[:num_kv_heads], kv_GBSD[num_kv_heads:], attn_mask=mask_B1S
    )
    return out_GBgD.transpose(0, 1).reshape(num_seqs, num_heads, head_dim)
