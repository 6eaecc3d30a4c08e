"""Attention of a chunk of one sequence over its paged KV: causal inside the chunk, everything before it visible.

C tokens of the chunk, S tokens up to its end, N query heads, G kv heads, g queries per kv head, D head_dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def prefill_attention(
    q_CND: Tensor, k_pool: Tensor, v_pool: Tensor, block_ids: Tensor, num_keys: int, mask_CS: Tensor | None
) -> Tensor:
    """Attend a chunk to the first `num_keys` positions of its blocks. Returns [C, N, D].

    The pools are [num_blocks, block_size, G, D]. Without a mask the chunk starts at position 0 and plain causality
    holds.
    """
    chunk_size, num_heads, head_dim = q_CND.shape
    num_kv_heads = k_pool.shape[2]
    group = num_heads // num_kv_heads
    k_GgSD = _heads_first(k_pool, block_ids, num_keys).unsqueeze(1).expand(-1, group, -1, -1)
    v_GgSD = _heads_first(v_pool, block_ids, num_keys).unsqueeze(1).expand(-1, group, -1, -1)
    q_GgCD = q_CND.view(chunk_size, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    out = F.scaled_dot_product_attention(q_GgCD, k_GgSD, v_GgSD, attn_mask=mask_CS, is_causal=mask_CS is None)
    return out.permute(2, 0, 1, 3).reshape(chunk_size, num_heads, head_dim)


def _heads_first(pool: Tensor, block_ids: Tensor, num_keys: int) -> Tensor:
    """[G, S, D] view of the gathered blocks."""
    return pool.index_select(0, block_ids).flatten(0, 1)[:num_keys].transpose(0, 1)
