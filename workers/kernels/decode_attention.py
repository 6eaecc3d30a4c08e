"""Attention of one new token per sequence over its paged KV.

B sequences, N query heads, G kv heads, g queries per kv head, D head_dim, M blocks and S keys of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.cpu.library import VALUE_KINDS, native
from workers.kernels.linear import Rows, Weight
from workers.kernels.tiles import TILE, TileWeight
from workers.kernels.triton.choice import has_triton


@dataclass(frozen=True)
class PagedKeys:
    """Where each sequence's keys lie: its block ids, and how many keys there are. Tables are padded with valid ids."""

    tables_BM: Tensor
    num_keys_B: Tensor
    longest: int
    """The largest of `num_keys_B`, which the device need not be asked for."""

    @cached_property
    def mask_B1S(self) -> Tensor:
        """Additive: hides what lies behind a sequence's end."""
        keys_S = torch.arange(self.longest, device=self.num_keys_B.device)
        is_hidden_BS = keys_S >= self.num_keys_B[:, None]
        return torch.zeros(is_hidden_BS.shape, device=keys_S.device).masked_fill_(is_hidden_BS, -torch.inf)[:, None]


def decode_attention(q_BND: Tensor, pool: Tensor, keys: PagedKeys) -> Tensor:
    """Attend each query to its own blocks of a pool [2G, num_blocks, block_size, D], K before V. Returns [B, N, D]."""
    library = native() if q_BND.device.type == "cpu" else None
    if library is None and has_triton(q_BND.device.type):
        from workers.kernels.triton import decode_attention as paged

        return paged.decode_attention(q_BND, pool, keys.tables_BM, keys.num_keys_B, keys.longest)
    if library is None:
        return _gathered_attention(q_BND, pool, keys)
    num_seqs, num_heads, head_dim = q_BND.shape
    num_kv_heads, (num_blocks, block_size) = pool.shape[0] // 2, pool.shape[1:3]
    out_BND = torch.empty(num_seqs, num_heads, head_dim)
    library.mull_decode_attention(
        *(q_BND.data_ptr(), q_BND.stride(0), num_seqs, num_heads, num_kv_heads, head_dim),
        *(pool.data_ptr(), VALUE_KINDS[pool.dtype], num_blocks * block_size, block_size),
        *(keys.tables_BM.data_ptr(), keys.tables_BM.stride(0), keys.num_keys_B.data_ptr(), out_BND.data_ptr()),
    )
    return out_BND


def decode_attention_for(q_BND: Tensor, pool: Tensor, keys: PagedKeys, consumer: Weight) -> Rows:
    """`decode_attention` as the product with `consumer` reads it, [B, N * D]."""
    if isinstance(consumer, TileWeight) and q_BND.shape[2] == TILE:
        from workers.kernels.triton import decode_attention as paged

        return paged.decode_attention_quantize(q_BND, pool, keys.tables_BM, keys.num_keys_B, keys.longest)
    return decode_attention(q_BND, pool, keys).flatten(1)


def _gathered_attention(q_BND: Tensor, pool: Tensor, keys: PagedKeys) -> Tensor:
    """Queries of a group ride as rows of one product, so no KV head is copied; kv heads take the batch's place and
    sequences that of the heads, so that the gathered blocks need no other order.
    """
    num_seqs, num_heads, head_dim = q_BND.shape
    num_kv_heads = pool.shape[0] // 2
    kv_GBSD = pool.index_select(1, keys.tables_BM.flatten()).view(2 * num_kv_heads, num_seqs, -1, head_dim)
    q_GBgD = q_BND.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(0, 1)
    k_GBSD, v_GBSD = kv_GBSD[:, :, : keys.longest].to(q_BND.dtype).chunk(2)
    out_GBgD = F.scaled_dot_product_attention(q_GBgD, k_GBSD, v_GBSD, attn_mask=keys.mask_B1S.to(q_BND.dtype))
    return out_GBgD.transpose(0, 1).reshape(num_seqs, num_heads, head_dim)
