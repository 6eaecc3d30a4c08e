"""A sum over ranks' parts in their order, rounded behind each as separate additions round: the same bits in one launch.

W parts of n elements each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.numerics import cast

BLOCK = 1024


def sum_in_order(parts_Wn: Tensor, out_n: Tensor) -> Tensor:
    """Over W, into `out_n`; both lie without gaps, and not in the same place."""
    if size := out_n.numel():
        _sum_in_order[(triton.cdiv(size, BLOCK),)](parts_Wn, out_n, size, len(parts_Wn), BLOCK)
    return out_n


@triton.jit
def _sum_in_order(parts_ptr, out_ptr, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    at_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there_B = at_B < size
    total_B = tl.load(parts_ptr + at_B, mask=is_there_B, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        part_B = tl.load(parts_ptr + tl.full((), part, tl.int64) * size + at_B, mask=is_there_B, other=0.0)
        total_B = cast(total_B + part_B.to(tl.float32), out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + at_B, cast(total_B, out_ptr.dtype.element_ty), mask=is_there_B)
