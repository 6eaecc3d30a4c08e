"""Between the QKV product and attention: norms and rotary positions of Q and K, and K and V into their cells.

T tokens, N local query heads, G local kv heads, X is N + 2G: the heads of Q, of K, of V. D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.cpu.library import VALUE_KINDS, native
from workers.kernels.sums import PartialSums, Sums
from workers.kernels.triton.choice import has_triton


def heads_of(
    product: Sums,
    norms_YD: Tensor,
    eps: float,
    rotations_T2D: Tensor,
    pool: Tensor | None,
    cells_T: Tensor | None,
) -> Tensor:
    """A product [T, X * D] as heads [T, X, D] behind `qk_norm_rope_store`, which adds up what comes in parts."""
    if isinstance(product, PartialSums):
        from workers.kernels.triton import qk_norm_rope

        parts_SRO, dtype = product.parts_SRO, product.dtype
        return qk_norm_rope.sum_norm_rope_store(parts_SRO, dtype, norms_YD, eps, rotations_T2D, pool, cells_T)
    heads_TXD = product.view(len(product), -1, norms_YD.shape[1])
    qk_norm_rope_store(heads_TXD, norms_YD, eps, rotations_T2D, pool, cells_T)
    return heads_TXD


def qk_norm_rope_store(
    heads_TXD: Tensor,
    norms_YD: Tensor,
    eps: float,
    rotations_T2D: Tensor,
    pool: Tensor | None,
    cells_T: Tensor | None,
) -> None:
    """Norm and rotate the first Y = N + G heads in place (half-split RoPE of the Qwen checkpoints), then store K and V.

    `norms_YD` holds each head's norm weights; `rotations_T2D` cosines, and sines negated in their first half. The pool
    is [2G, num_blocks, block_size, D], and cells are block_id * block_size + offset; without it (heads of Q alone)
    nothing is stored.
    """
    num_tokens, _, head_dim = heads_TXD.shape
    num_kv_heads = 0 if pool is None else pool.shape[0] // 2
    num_q_heads = len(norms_YD) - num_kv_heads
    library = native() if heads_TXD.device.type == "cpu" else None
    if library is None and has_triton(heads_TXD.device.type):
        from workers.kernels.triton import qk_norm_rope

        qk_norm_rope.qk_norm_rope_store(heads_TXD, norms_YD, eps, rotations_T2D, pool, cells_T)
        return
    if library is None:
        _norm_and_rotate(heads_TXD[:, : len(norms_YD)], norms_YD, eps, rotations_T2D)
        if pool is not None and cells_T is not None:
            pool.flatten(1, 2).index_copy_(1, cells_T, heads_TXD[:, num_q_heads:].transpose(0, 1).to(pool.dtype))
        return
    stored: tuple[int | None, int, int] = (None, 0, 0)
    if pool is not None:
        stored = (pool.data_ptr(), VALUE_KINDS[pool.dtype], pool.shape[1] * pool.shape[2])
    library.mull_rotate_and_store(
        *(heads_TXD.data_ptr(), heads_TXD.stride(0), num_tokens, num_q_heads, num_kv_heads, head_dim),
        *(norms_YD.data_ptr(), eps, rotations_T2D.data_ptr(), *stored),
        None if cells_T is None else cells_T.data_ptr(),
    )


def _norm_and_rotate(heads_TYD: Tensor, norms_YD: Tensor, eps: float, rotations_T2D: Tensor) -> None:
    head_dim = heads_TYD.shape[-1]
    normed_TYD = F.rms_norm(heads_TYD, (head_dim,), None, eps) * norms_YD
    swapped_TYD = normed_TYD.roll(head_dim // 2, dims=-1)
    cos_T1D, signed_sin_T1D = rotations_T2D[:, None].unbind(2)
    torch.addcmul(normed_TYD * cos_T1D, swapped_TYD, signed_sin_T1D, out=heads_TYD)
