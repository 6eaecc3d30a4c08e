"""Rotary position embedding in the half-split form of the Qwen and Llama checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_into(out_TND: Tensor, x_TND: Tensor, cos_T1D: Tensor, signed_sin_T1D: Tensor) -> None:
    """Rotate dimension pairs (i, i + D/2).

    The first half of `signed_sin_T1D` is negated, so that one roll does the swap.
    """
    swapped = x_TND.roll(x_TND.shape[-1] // 2, dims=-1)
    torch.addcmul(x_TND * cos_T1D, swapped, signed_sin_T1D, out=out_TND)
