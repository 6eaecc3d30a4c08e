"""Between the QKV product and attention: norms and rotary positions of Q and K, and K and V into their cells.

One head of one token a program. T tokens, N local query heads, G local kv heads, X is N + 2G: the heads of Q, of K, of
V; D head_dim, F half of it.
"""

from __future__ import annotations

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
    num_tokens, num_heads, head_dim = heads_TXD.shape
    num_kv_heads = 0 if pool is None else pool.shape[0] // 2
    if num_tokens:
        _norm_rotate_store[(num_tokens, num_heads)](
            *(heads_TXD, heads_TXD.stride(0), norms_YD, eps, rotations_T2D, pool, cells_T),
            *(0 if pool is None else pool.stride(0), len(norms_YD), len(norms_YD) - num_kv_heads),
            *(head_dim // 2, triton.next_power_of_2(head_dim // 2)),
            num_warps=1,
        )


@triton.jit
def _norm_rotate_store(
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
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column_F = tl.arange(0, BLOCK)
    is_there_F = column_F < HALF
    head_ptr_F = heads_ptr + token * heads_stride + head * 2 * HALF + column_F
    first_F = tl.load(head_ptr_F, mask=is_there_F, other=0.0).to(tl.float32)
    second_F = tl.load(head_ptr_F + HALF, mask=is_there_F, other=0.0).to(tl.float32)
    dtype = heads_ptr.dtype.element_ty
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
        tl.store(head_ptr_F, cast(first_F, dtype), mask=is_there_F)
        tl.store(head_ptr_F + HALF, cast(second_F, dtype), mask=is_there_F)
    if pool_ptr is not None:
        if head >= num_q_heads:
            cell = tl.load(cells_ptr + token).to(tl.int64)
            cell_ptr_F = pool_ptr + (head - num_q_heads).to(tl.int64) * pool_stride + cell * 2 * HALF + column_F
            kv_dtype = pool_ptr.dtype.element_ty
            tl.store(cell_ptr_F, cast(first_F, kv_dtype), mask=is_there_F)
            tl.store(cell_ptr_F + HALF, cast(second_F, kv_dtype), mask=is_there_F)
