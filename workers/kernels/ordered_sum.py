"""The sum of ranks' parts, one after another: torch's own sum may pair them otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels.triton.choice import has_triton

DTYPES = (torch.bfloat16, torch.float32)


def sum_in_order(parts: Tensor, out: Tensor | None = None) -> Tensor:
    """Over dim 0, in the parts' own type; the parts may be changed. `out`: where the sum is to lie, without gaps."""
    if has_triton(parts.device.type) and parts.dtype in DTYPES:
        from workers.kernels.triton import ordered_sum

        return ordered_sum.sum_in_order(parts.contiguous(), torch.empty_like(parts[0]) if out is None else out)
    total, *others = parts.unbind()
    for part in others:
        total += part
    return total if out is None else out.copy_(total)
