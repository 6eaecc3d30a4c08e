"""FlashAttention-3 over the paged KV of prompts, where flash_attn_interface is installed.

Its interface as of 2026: `flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=, page_table=, cu_seqlens_q=,
max_seqlen_q=, causal=)` with q [T, N, D], caches [num_blocks, block_size, G, D] whose last dimension alone must be
contiguous, int32 lengths and tables. A causal mask is aligned to each sequence's end: a chunk sees what is before it.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from workers.kernels.invariance import is_invariant
from workers.kernels.optional import installed

HEAD_DIMS = (64, 128, 256)


def fits(head_dim: int, dtype: torch.dtype, pool_dtype: torch.dtype) -> bool:
    """Whether it is for these heads: it wants queries and keys of one type."""
    return head_dim in HEAD_DIMS and dtype == pool_dtype and dtype in (torch.bfloat16, torch.float16)


def library_for(q_TND: Tensor, pool: Tensor) -> ModuleType | None:
    """The library where it is installed, fits, and no bit has to be that of a decode."""
    if is_invariant() or not fits(q_TND.shape[-1], q_TND.dtype, pool.dtype):
        return None
    return installed("flash_attn_interface")


def prefill_attention(
    library: ModuleType, q_TND: Tensor, pool: Tensor, tables_CM: Tensor, ends_2C: Tensor, longest_chunk: int
) -> Tensor:
    """Attend each token to its sequence up to itself, [T, N, D].

    `ends_2C`, int32: behind each chunk's last row, and its sequence's length up to there, each after a first column of
    zeros. The pool is [2G, num_blocks, block_size, D], K before V.
    """
    k_cache, v_cache = pool.permute(1, 2, 0, 3).chunk(2, dim=2)
    out_TND: Tensor = library.flash_attn_with_kvcache(
        q_TND,
        k_cache,
        v_cache,
        cache_seqlens=ends_2C[1, 1:],
        page_table=tables_CM.int(),
        cu_seqlens_q=ends_2C[0],
        max_seqlen_q=longest_chunk,
        causal=True,
    )
    return out_TND
