"""Root-mean-square norm of rows: alone or behind the residual's sum; as it is or quantised for the next product.

One row a program, so that a row's bits depend on nothing else. R rows, H columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.numerics import TILE, cast, quantized
from workers.kernels.triton.rows import QuantizedRows


def rms_norm(x_RH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight."""
    num_rows, size = x_RH.shape
    out_RH = torch.empty(num_rows, size, dtype=x_RH.dtype, device=x_RH.device)
    if num_rows:
        _norm[(num_rows,)](
            x_RH, x_RH.stride(0), None, 0, weight_H, out_RH, size, eps, triton.next_power_of_2(size), False
        )
    return out_RH


def add_rms_norm(x_RH: Tensor, delta_RH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Add `delta_RH` to `x_RH` in place and return the sum's norm."""
    num_rows, size = x_RH.shape
    out_RH = torch.empty(num_rows, size, dtype=x_RH.dtype, device=x_RH.device)
    if num_rows:
        _norm[(num_rows,)](
            *(x_RH, x_RH.stride(0), delta_RH, delta_RH.stride(0), weight_H, out_RH, size, eps),
            *(triton.next_power_of_2(size), True),
        )
    return out_RH


def rms_norm_quantize(x_RH: Tensor, weight_H: Tensor, eps: float) -> QuantizedRows:
    """`rms_norm` as the FP8 products read it. H must be a multiple of 128."""
    num_rows, size = x_RH.shape
    out = QuantizedRows.empty(num_rows, size, x_RH.dtype, x_RH.device)
    if num_rows:
        _norm_quantize[(num_rows,)](
            *(x_RH, x_RH.stride(0), None, 0, weight_H, out.codes_RI, out.scale_Rk, out.scale_Rk.stride(1)),
            *(size, eps, triton.next_power_of_2(size), False),
        )
    return out


def add_rms_norm_quantize(x_RH: Tensor, delta_RH: Tensor, weight_H: Tensor, eps: float) -> QuantizedRows:
    """`add_rms_norm` as the FP8 products read it. H must be a multiple of 128."""
    num_rows, size = x_RH.shape
    out = QuantizedRows.empty(num_rows, size, x_RH.dtype, x_RH.device)
    if num_rows:
        _norm_quantize[(num_rows,)](
            *(x_RH, x_RH.stride(0), delta_RH, delta_RH.stride(0), weight_H),
            *(out.codes_RI, out.scale_Rk, out.scale_Rk.stride(1), size, eps, triton.next_power_of_2(size), True),
        )
    return out


@triton.jit
def _normed(x_ptr, x_stride, delta_ptr, delta_stride, weight_ptr, size, eps, BLOCK: tl.constexpr, ADDS: tl.constexpr):
    row, column_H = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_there_H = column_H < size
    x_H = tl.load(x_ptr + row * x_stride + column_H, mask=is_there_H, other=0.0).to(tl.float32)
    if ADDS:
        delta_H = tl.load(delta_ptr + row * delta_stride + column_H, mask=is_there_H, other=0.0)
        rounded_H = cast(x_H + delta_H.to(tl.float32), x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * x_stride + column_H, rounded_H, mask=is_there_H)
        x_H = rounded_H.to(tl.float32)
    weight_H = tl.load(weight_ptr + column_H, mask=is_there_H, other=0.0).to(tl.float32)
    return x_H * (1.0 / tl.sqrt(tl.sum(x_H * x_H, axis=0) / size + eps)) * weight_H


@triton.jit
def _norm(
    x_ptr,
    x_stride,
    delta_ptr,
    delta_stride,
    weight_ptr,
    out_ptr,
    size,
    eps,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
):
    normed_H = _normed(x_ptr, x_stride, delta_ptr, delta_stride, weight_ptr, size, eps, BLOCK, ADDS)
    row, column_H = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    tl.store(out_ptr + row * size + column_H, cast(normed_H, out_ptr.dtype.element_ty), mask=column_H < size)


@triton.jit(do_not_specialize=["scale_stride"])
def _norm_quantize(
    x_ptr,
    x_stride,
    delta_ptr,
    delta_stride,
    weight_ptr,
    codes_ptr,
    scale_ptr,
    scale_stride,
    size,
    eps,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
):
    normed_H = _normed(x_ptr, x_stride, delta_ptr, delta_stride, weight_ptr, size, eps, BLOCK, ADDS)
    row, tile_k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK // TILE)
    values_kC, scale_k = quantized(tl.reshape(normed_H, [BLOCK // TILE, TILE]))
    column_kC = tile_k[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(codes_ptr + row * size + column_kC, cast(values_kC, tl.float8e4nv), mask=column_kC < size)
    tl.store(scale_ptr + row + tile_k.to(tl.int64) * scale_stride, scale_k, mask=tile_k * TILE < size)
