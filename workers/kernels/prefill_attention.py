"""Causal attention of known tokens: of whole prompts, and of chunks whose sequences began in earlier steps.

C chunks, M blocks of the longest sequence, T tokens of all chunks, S tokens up to a chunk's end, N query heads, G kv
heads, g queries per kv head, X the 2G heads of K, then of V, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels import flash_attention
from workers.kernels.cpu.library import VALUE_KINDS, native
from workers.kernels.triton.choice import has_triton
from workers.transfers import to_device


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """Tokens of several sequences, one chunk behind the other, and where each sequence's K and V lie: their own too."""

    tables_CM: Tensor
    """Block ids, padded with valid ones."""
    starts: npt.NDArray[np.int64]
    """Positions of the chunks' first tokens."""
    sizes: npt.NDArray[np.int64]

    @cached_property
    def bounds_3C(self) -> Tensor:
        """On the tables' device: the chunks' first positions, first rows and sizes."""
        first_rows = np.cumsum(self.sizes) - self.sizes
        return to_device(np.stack([self.starts, first_rows, self.sizes]), self.tables_CM.device)

    @cached_property
    def ends_2C(self) -> Tensor:
        """int32, on the device: behind each chunk's last row, and its sequence's end, after a column of zeros."""
        ends = np.stack([np.cumsum(self.sizes), self.starts + self.sizes]).astype(np.int32)
        return to_device(np.pad(ends, ((0, 0), (1, 0))), self.tables_CM.device)

    @cached_property
    def alike(self) -> list[range]:
        """Chunks that torch takes together: prompts of equal length, or one that goes on from earlier steps."""
        groups: list[range] = []
        for (start, _), members in groupby(zip(self.starts.tolist(), self.sizes.tolist(), strict=True)):
            first, count = groups[-1].stop if groups else 0, len(list(members))
            ends = [first, first + count] if start == 0 else list(range(first, first + count + 1))
            groups += [range(*pair) for pair in pairwise(ends)]
        return groups

    @cached_property
    def masks(self) -> dict[int, Tensor]:
        """Additive, [size, S], of each chunk that goes on from earlier steps."""
        masks = {}
        for chunk, (start, size) in enumerate(zip(self.starts.tolist(), self.sizes.tolist(), strict=True)):
            if start:
                mask_CS = torch.full((size, start + size), -math.inf, device=self.tables_CM.device)
                masks[chunk] = mask_CS.triu_(start + 1)
        return masks


def prefill_attention(q_TND: Tensor, kv_TXD: Tensor, pool: Tensor, chunks: Chunks) -> Tensor:
    """Attend each token to its sequence up to itself. `kv_TXD`: of the chunks' tokens, stored in the pool already.

    The pool is [2G, num_blocks, block_size, D], K before V. Returns [T, N, D].
    """
    library = native() if q_TND.device.type == "cpu" else None
    if library is None and has_triton(q_TND.device.type):
        from workers.kernels.triton import prefill_attention as paged

        flash = flash_attention.library_for(q_TND, pool)
        if flash is not None:
            longest = int(chunks.sizes.max())
            return flash_attention.prefill_attention(flash, q_TND, pool, chunks.tables_CM, chunks.ends_2C, longest)
        return paged.prefill_attention(q_TND, pool, chunks.tables_CM, chunks.bounds_3C, chunks.sizes.tolist())
    if library is None:
        return _gathered_attention(q_TND, kv_TXD, pool, chunks)
    num_tokens, num_heads, head_dim = q_TND.shape
    num_kv_heads, (num_blocks, block_size) = pool.shape[0] // 2, pool.shape[1:3]
    out_TND = torch.empty(num_tokens, num_heads, head_dim)
    library.mull_prefill_attention(
        *(q_TND.data_ptr(), q_TND.stride(0), len(chunks.sizes), chunks.starts.ctypes.data, chunks.sizes.ctypes.data),
        *(num_heads, num_kv_heads, head_dim, pool.data_ptr(), VALUE_KINDS[pool.dtype]),
        *(num_blocks * block_size, block_size),
        *(chunks.tables_CM.data_ptr(), chunks.tables_CM.stride(0), out_TND.data_ptr()),
    )
    return out_TND


def _gathered_attention(q_TND: Tensor, kv_TXD: Tensor, pool: Tensor, chunks: Chunks) -> Tensor:
    outs, first = [], 0
    kv_TXD = kv_TXD.to(pool.dtype).to(q_TND.dtype)
    for group in chunks.alike:
        rows = slice(first, first + int(chunks.sizes[group.start : group.stop].sum()))
        if chunks.starts[group.start] == 0:
            outs.append(_prompts(q_TND[rows], kv_TXD[rows], len(group)))
        else:
            mask_CS = chunks.masks[group.start].to(q_TND.dtype)
            outs.append(_chunk(q_TND[rows], pool, chunks.tables_CM[group.start], mask_CS))
        first = rows.stop
    return torch.cat(outs)


def _prompts(q_TND: Tensor, kv_TXD: Tensor, num_seqs: int) -> Tensor:
    """Sequences of equal length, all from position 0: nothing but their own tokens is attended to."""
    num_kv_heads = kv_TXD.shape[1] // 2
    q_BNCD = q_TND.view(num_seqs, -1, *q_TND.shape[1:]).transpose(1, 2)
    kv_BXCD = kv_TXD.view(num_seqs, -1, *kv_TXD.shape[1:]).transpose(1, 2)
    k_BGCD, v_BGCD = kv_BXCD[:, :num_kv_heads], kv_BXCD[:, num_kv_heads:]
    out_BNCD = F.scaled_dot_product_attention(q_BNCD, k_BGCD, v_BGCD, is_causal=True, enable_gqa=True)
    return out_BNCD.transpose(1, 2).flatten(0, 1)


def _chunk(q_CND: Tensor, pool: Tensor, table_M: Tensor, mask_CS: Tensor) -> Tensor:
    """One chunk, to the first S positions of its sequence's blocks, as the mask allows."""
    num_kv_heads, num_keys = pool.shape[0] // 2, mask_CS.shape[1]
    chunk_size, num_heads, head_dim = q_CND.shape
    group = num_heads // num_kv_heads
    blocks = pool.index_select(1, table_M[: -(-num_keys // pool.shape[2])]).to(q_CND.dtype)
    kv_XgSD = blocks.flatten(1, 2)[:, None, :num_keys].expand(-1, group, -1, -1)
    q_GgCD = q_CND.view(chunk_size, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    out_GgCD = F.scaled_dot_product_attention(q_GgCD, kv_XgSD[:num_kv_heads], kv_XgSD[num_kv_heads:], attn_mask=mask_CS)
    return out_GgCD.permute(2, 0, 1, 3).flatten(1, 2)
