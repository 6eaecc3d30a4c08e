"""Between the QKV product and attention: norms and rotary positions of Q and K, and K and V into their cells.

One head of one token a program. T tokens, N local query heads, G local kv heads, X is N + 2G: the heads of Q, of K, of
V; D head_dim, F half of it; S parts of a sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.numerics import cast


def qk_norm_rope_store(
    heads_TXD: Tensor,
    norms_YD: Tensor,
    eps: float,
    rotations_T2D: Tensor,
    pool: Tensor | None,
    cells_T: Tensor | None,
) -> None:
    """Norm and rotate the first Y = N + G heads in place, then store K and V in the pool's dtype, e4m3 saturating.

    `norms_YD` holds each head's norm weights; `rotations_T2D` cosines, and sines negated in their first half. The pool
    is [2G, num_blocks, block_size, D], and cells are block_id * block_size + offset; without it nothing is stored.
    """
    _launch(heads_TXD, 0, 1, heads_TXD, norms_YD, eps, rotations_T2D, pool, cells_T)


def sum_norm_rope_store(
    parts_SRO: Tensor,
    dtype: torch.dtype,
    norms_YD: Tensor,
    eps: float,
    rotations_T2D: Tensor,
    pool: Tensor | None,
    cells_T: Tensor | None,
) -> Tensor:
    """The same of heads that come in parts: they are added in order and rounded to `dtype` first. [T, X, D]."""
    (num_parts, num_tokens, size), head_dim = parts_SRO.shape, norms_YD.shape[1]
    heads_TXD = torch.empty(num_tokens, size // head_dim, head_dim, dtype=dtype, device=parts_SRO.device)
    _launch(parts_SRO, parts_SRO.stride(0), num_parts, heads_TXD, norms_YD, eps, rotations_T2D, pool, cells_T)
    return heads_TXD


def _launch(
    parts: Tensor,
    part_stride: int,
    num_parts: int,
    heads_TXD: Tensor,
    norms_YD: Tensor,
    eps: float,
    rotations_T2D: Tensor,
    pool: Tensor | None,
    cells_T: Tensor | None,
) -> None:
    """Rows of the parts and of the heads lie alike."""
    num_tokens, num_heads, head_dim = heads_TXD.shape
    num_kv_heads = 0 if pool is None else pool.shape[0] // 2
    if num_tokens:
        _norm_rotate_store[(num_tokens, num_heads)](
            *(parts, part_stride, heads_TXD, heads_TXD.stride(0), norms_YD, eps, rotations_T2D, pool, cells_T),
            *(0 if pool is None else pool.stride(0), len(norms_YD), len(norms_YD) - num_kv_heads),
            *(num_parts, head_dim // 2, triton.next_power_of_2(head_dim // 2)),
            num_warps=1,
        )


@triton.jit(do_not_specialize=["part_stride"])
def _norm_rotate_store(
    parts_ptr,
    part_stride,
    heads_ptr,
    heads_stride,
    norms_ptr,
    eps,
    rotations_ptr,
    pool_ptr,
    cells_ptr,
    pool_stride,
    num_normed,
    num_q_heads,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column_F = tl.arange(0, BLOCK)
    is_there_F = column_F < HALF
    at_F = token * heads_stride + head * 2 * HALF + column_F
    head_ptr_F = heads_ptr + at_F
    dtype = heads_ptr.dtype.element_ty
    first_F, second_F = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        part_ptr_F = parts_ptr + tl.full((), part, tl.int64) * part_stride + at_F
        first_F += tl.load(part_ptr_F, mask=is_there_F, other=0.0).to(tl.float32)
        second_F += tl.load(part_ptr_F + HALF, mask=is_there_F, other=0.0).to(tl.float32)
    first_F, second_F = cast(first_F, dtype).to(tl.float32), cast(second_F, dtype).to(tl.float32)
    if head < num_normed:
        square = (tl.sum(first_F * first_F, axis=0) + tl.sum(second_F * second_F, axis=0)) / (2 * HALF)
        factor = 1.0 / tl.sqrt(square + eps)
        norm_ptr_F = norms_ptr + head * 2 * HALF + column_F
        first_F = first_F * factor * tl.load(norm_ptr_F, mask=is_there_F, other=0.0).to(tl.float32)
        second_F = second_F * factor * tl.load(norm_ptr_F + HALF, mask=is_there_F, other=0.0).to(tl.float32)
        # Cosines and sines of the second half: the first has the same, the sines negated.
        rotation_ptr_F = rotations_ptr + token * 4 * HALF + HALF + column_F
        cos_F = tl.load(rotation_ptr_F, mask=is_there_F, other=0.0).to(tl.float32)
        sin_F = tl.load(rotation_ptr_F + 2 * HALF, mask=is_there_F, other=0.0).to(tl.float32)
        rotated_F = first_F * cos_F - second_F * sin_F
        second_F = second_F * cos_F + first_F * sin_F
        first_F = rotated_F
    if PARTS > 1 or head < num_normed:
        tl.store(head_ptr_F, cast(first_F, dtype), mask=is_there_F)
        tl.store(head_ptr_F + HALF, cast(second_F, dtype), mask=is_there_F)
    if pool_ptr is not None:
        if head >= num_q_heads:
            cell = tl.load(cells_ptr + token).to(tl.int64)
            cell_ptr_F = pool_ptr + (head - num_q_heads).to(tl.int64) * pool_stride + cell * 2 * HALF + column_F
            kv_dtype = pool_ptr.dtype.element_ty
            tl.store(cell_ptr_F, cast(first_F, kv_dtype), mask=is_there_F)
            tl.store(cell_ptr_F + HALF, cast(second_F, kv_dtype), mask=is_there_F)
