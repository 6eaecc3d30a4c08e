"""Root-mean-square norm over the last dimension, alone and behind the residual's sum."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from workers.kernels.cpu.library import native
from workers.kernels.linear import Rows, Weight
from workers.kernels.sums import Sums
from workers.kernels.tiles import TileWeight
from workers.kernels.triton.choice import has_triton
from workers.kernels.triton.rows import QuantizedRows


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight."""
    library = native() if x_TH.device.type == "cpu" else None
    if library is None and has_triton(x_TH.device.type):
        from workers.kernels.triton import norm

        return norm.rms_norm(x_TH, weight_H, eps)
    if library is None:
        return F.rms_norm(x_TH, (x_TH.shape[-1],), weight_H, eps)
    num_rows, size = x_TH.shape
    out_TH = x_TH.new_empty(num_rows, size)
    library.mull_rms_norm(x_TH.data_ptr(), x_TH.stride(0), num_rows, size, weight_H.data_ptr(), eps, out_TH.data_ptr())
    return out_TH


def add_rms_norm(x_TH: Tensor, delta_TH: Sums, weight_H: Tensor, eps: float) -> Tensor:
    """Add `delta_TH` to `x_TH` in place and return the sum's norm."""
    library = native() if x_TH.device.type == "cpu" else None
    if library is None and has_triton(x_TH.device.type):
        from workers.kernels.triton import norm

        return norm.add_rms_norm(x_TH, delta_TH, weight_H, eps)
    assert isinstance(delta_TH, Tensor), "parts come from Triton's kernels alone"
    if library is None:
        x_TH += delta_TH
        return rms_norm(x_TH, weight_H, eps)
    assert x_TH.is_contiguous(), "the residual is a whole tensor, changed in place"
    delta_TH = delta_TH.contiguous()
    num_rows, size = x_TH.shape
    out_TH = x_TH.new_empty(num_rows, size)
    library.mull_add_rms_norm(
        x_TH.data_ptr(), delta_TH.data_ptr(), num_rows, size, weight_H.data_ptr(), eps, out_TH.data_ptr()
    )
    return out_TH


def rms_norm_for(x_TH: Tensor, weight_H: Tensor, eps: float, consumer: Weight) -> Rows:
    """`rms_norm` as the product with `consumer` reads it."""
    if isinstance(consumer, TileWeight):
        from workers.kernels.triton import norm

        return norm.rms_norm_quantize(x_TH, weight_H, eps)
    return rms_norm(x_TH, weight_H, eps)


def add_rms_norm_for(x_TH: Tensor, delta_TH: Sums, weight_H: Tensor, eps: float, consumer: Weight) -> Rows:
    """`add_rms_norm` as the product with `consumer` reads it."""
    if isinstance(consumer, TileWeight):
        from workers.kernels.triton import norm

        return norm.add_rms_norm_quantize(x_TH, delta_TH, weight_H, eps)
    return add_rms_norm(x_TH, delta_TH, weight_H, eps)


def add_rms_norm_both(
    x_TH: Tensor, delta_TH: Sums, weight_H: Tensor, eps: float, consumer: Weight
) -> tuple[Tensor, QuantizedRows | None]:
    """`add_rms_norm`, and the same as products with `consumer` read it, where they read something else."""
    if isinstance(consumer, TileWeight):
        from workers.kernels.triton import norm

        return norm.add_rms_norm_both(x_TH, delta_TH, weight_H, eps)
    return add_rms_norm(x_TH, delta_TH, weight_H, eps), None
