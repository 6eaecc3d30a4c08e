"""What a token's experts gave, back in the order of tokens: summed in the order of its choices, without atomics.

T tokens, K chosen experts, R places, H hidden, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.numerics import cast

BLOCK = 1024


def combine(
    y_SRH: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    place_P: Tensor,
    first_slot: int,
    num_local: int,
    dtype: torch.dtype,
) -> Tensor:
    """[T, H]: sum over K of weight * (sum over S of y, in `dtype`); pairs of other ranks add nothing."""
    (num_tokens, top_k), (num_splits, num_places, hidden) = slots_TK.shape, y_SRH.shape
    out_TH = torch.empty(num_tokens, hidden, dtype=dtype, device=y_SRH.device)
    block = min(BLOCK, triton.next_power_of_2(hidden))
    if num_tokens:
        _combine[(num_tokens, triton.cdiv(hidden, block))](
            *(y_SRH, slots_TK.contiguous(), weights_TK.contiguous(), place_P, out_TH, num_places, hidden),
            *(first_slot, num_local, top_k, num_splits, block),
        )
    return out_TH


@triton.jit(do_not_specialize=["num_places"])
def _combine(
    y_ptr,
    slots_ptr,
    weights_ptr,
    place_ptr,
    out_ptr,
    num_places,
    hidden,
    first_slot,
    num_local,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, column_H = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there_H = column_H < hidden
    total_H = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        local = tl.load(slots_ptr + pair) - first_slot
        is_local = (local >= 0) & (local < num_local)
        place = tl.load(place_ptr + pair, mask=is_local, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + pair).to(tl.float32)
        y_H = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            at_H = (split * num_places + place) * hidden + column_H
            y_H += tl.load(y_ptr + at_H, mask=is_there_H & is_local, other=0.0).to(tl.float32)
        total_H += weight * cast(y_H, out_ptr.dtype.element_ty).to(tl.float32)
    out_H = cast(total_H, out_ptr.dtype.element_ty)
    tl.store(out_ptr + token.to(tl.int64) * hidden + column_H, out_H, mask=is_there_H)
