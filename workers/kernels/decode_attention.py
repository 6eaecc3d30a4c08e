"""Attention of one new token per sequence over its paged KV.

B sequences, N query heads, G kv heads, D head_dim, S tokens of the longest sequence rounded up to blocks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def decode_attention(
    q_BND: Tensor, k_pool: Tensor, v_pool: Tensor, block_ids: Tensor, mask_B11S: Tensor | None
) -> Tensor:
    """Attend each query to its own blocks. Returns [B, N, D].

    k_pool and v_pool are [num_blocks, block_size, G, D]; `block_ids` lists every sequence's blocks one after
    another, padded to the longest; the additive mask hides the padding. Queries of a group ride as rows of one
    product, so no KV head is copied.
    """
    num_seqs, num_heads, head_dim = q_BND.shape
    num_kv_heads = k_pool.shape[2]
    k_BGSD = k_pool.index_select(0, block_ids).view(num_seqs, -1, num_kv_heads, head_dim).transpose(1, 2)
    v_BGSD = v_pool.index_select(0, block_ids).view(num_seqs, -1, num_kv_heads, head_dim).transpose(1, 2)
    q_BGgD = q_BND.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(q_BGgD, k_BGSD, v_BGSD, attn_mask=mask_B11S)
    return out.reshape(num_seqs, num_heads, head_dim)
