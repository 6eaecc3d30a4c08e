"""Root-mean-square norm of rows: alone or behind the residual's sum; as it is or quantised for the next product.

One row a program, so that a row's bits depend on nothing else. What is added may come in parts: they are added up and
rounded first, as if they had been before. R rows, H columns, S parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.sums import PartialSums, Sums
from workers.kernels.triton.numerics import TILE, cast, quantized
from workers.kernels.triton.rows import QuantizedRows


def rms_norm(x_RH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight."""
    num_rows, size = x_RH.shape
    out_RH = torch.empty(num_rows, size, dtype=x_RH.dtype, device=x_RH.device)
    if num_rows:
        _norm[(num_rows,)](
            *(x_RH, x_RH.stride(0), None, 0, 0, weight_H, out_RH, size, eps, triton.next_power_of_2(size), 0),
            num_warps=_warps(0),
        )
    return out_RH


def add_rms_norm(x_RH: Tensor, delta_RH: Sums, weight_H: Tensor, eps: float) -> Tensor:
    """Add `delta_RH` to `x_RH` in place and return the sum's norm."""
    (num_rows, size), delta = x_RH.shape, _parts(delta_RH)
    out_RH = torch.empty(num_rows, size, dtype=x_RH.dtype, device=x_RH.device)
    if num_rows:
        _norm[(num_rows,)](
            *(x_RH, x_RH.stride(0), *delta[:3], weight_H, out_RH, size, eps, triton.next_power_of_2(size), delta.num),
            num_warps=_warps(delta.num),
        )
    return out_RH


def rms_norm_quantize(x_RH: Tensor, weight_H: Tensor, eps: float) -> QuantizedRows:
    """`rms_norm` as the FP8 products read it. H must be a multiple of 128."""
    num_rows, size = x_RH.shape
    out = QuantizedRows.empty(num_rows, size, x_RH.dtype, x_RH.device)
    if num_rows:
        _norm_quantize[(num_rows,)](
            *(x_RH, x_RH.stride(0), None, 0, 0, weight_H, out.codes_RI, out.scale_Rk, out.scale_Rk.stride(1)),
            *(None, size, eps, triton.next_power_of_2(size), 0),
            num_warps=_warps(0),
        )
    return out


def add_rms_norm_quantize(x_RH: Tensor, delta_RH: Sums, weight_H: Tensor, eps: float) -> QuantizedRows:
    """`add_rms_norm` as the FP8 products read it. H must be a multiple of 128."""
    (num_rows, size), delta = x_RH.shape, _parts(delta_RH)
    out = QuantizedRows.empty(num_rows, size, x_RH.dtype, x_RH.device)
    if num_rows:
        _norm_quantize[(num_rows,)](
            *(x_RH, x_RH.stride(0), *delta[:3], weight_H, out.codes_RI, out.scale_Rk, out.scale_Rk.stride(1)),
            *(None, size, eps, triton.next_power_of_2(size), delta.num),
            num_warps=_warps(delta.num),
        )
    return out


def add_rms_norm_both(x_RH: Tensor, delta_RH: Sums, weight_H: Tensor, eps: float) -> tuple[Tensor, QuantizedRows]:
    """`add_rms_norm`, and its rows quantised. H must be a multiple of 128."""
    (num_rows, size), delta = x_RH.shape, _parts(delta_RH)
    normed_RH = torch.empty(num_rows, size, dtype=x_RH.dtype, device=x_RH.device)
    out = QuantizedRows.empty(num_rows, size, x_RH.dtype, x_RH.device)
    if num_rows:
        _norm_quantize[(num_rows,)](
            *(x_RH, x_RH.stride(0), *delta[:3], weight_H, out.codes_RI, out.scale_Rk, out.scale_Rk.stride(1)),
            *(normed_RH, size, eps, triton.next_power_of_2(size), delta.num),
            num_warps=_warps(delta.num),
        )
    return normed_RH, out


class _Parts(NamedTuple):
    """Of what is added, as a kernel takes them."""

    first: Tensor
    row_stride: int
    stride: int
    """From one to the next."""
    num: int


def _parts(delta: Sums) -> _Parts:
    if isinstance(delta, PartialSums):
        parts_SRH = delta.parts_SRO
        return _Parts(parts_SRH, parts_SRH.stride(1), parts_SRH.stride(0), len(parts_SRH))
    return _Parts(delta, delta.stride(0), 0, 1)


def _warps(num_parts: int) -> int:
    """More of them where there is more to wait for."""
    return 8 if num_parts > 1 else 4


@triton.jit
def _normed(
    x_ptr,
    x_stride,
    delta_ptr,
    delta_stride,
    part_stride,
    weight_ptr,
    size,
    eps,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    row, column_H = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    is_there_H = column_H < size
    x_H = tl.load(x_ptr + row * x_stride + column_H, mask=is_there_H, other=0.0).to(tl.float32)
    if PARTS > 0:
        delta_H = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            part_ptr = delta_ptr + tl.full((), part, tl.int64) * part_stride + row * delta_stride
            delta_H += tl.load(part_ptr + column_H, mask=is_there_H, other=0.0).to(tl.float32)
        delta_H = cast(delta_H, x_ptr.dtype.element_ty).to(tl.float32)
        rounded_H = cast(x_H + delta_H, x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * x_stride + column_H, rounded_H, mask=is_there_H)
        x_H = rounded_H.to(tl.float32)
    weight_H = tl.load(weight_ptr + column_H, mask=is_there_H, other=0.0).to(tl.float32)
    return x_H * (1.0 / tl.sqrt(tl.sum(x_H * x_H, axis=0) / size + eps)) * weight_H


@triton.jit(do_not_specialize=["part_stride"])
def _norm(
    x_ptr,
    x_stride,
    delta_ptr,
    delta_stride,
    part_stride,
    weight_ptr,
    out_ptr,
    size,
    eps,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    normed_H = _normed(x_ptr, x_stride, delta_ptr, delta_stride, part_stride, weight_ptr, size, eps, BLOCK, PARTS)
    row, column_H = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    tl.store(out_ptr + row * size + column_H, cast(normed_H, out_ptr.dtype.element_ty), mask=column_H < size)


@triton.jit(do_not_specialize=["scale_stride", "part_stride"])
def _norm_quantize(
    x_ptr,
    x_stride,
    delta_ptr,
    delta_stride,
    part_stride,
    weight_ptr,
    codes_ptr,
    scale_ptr,
    scale_stride,
    normed_ptr,
    size,
    eps,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    normed_H = _normed(x_ptr, x_stride, delta_ptr, delta_stride, part_stride, weight_ptr, size, eps, BLOCK, PARTS)
    row, tile_k = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK // TILE)
    if normed_ptr is not None:
        column_H = tl.arange(0, BLOCK)
        rounded_H = cast(normed_H, normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + row * size + column_H, rounded_H, mask=column_H < size)
        normed_H = rounded_H.to(tl.float32)
    values_kC, scale_k = quantized(tl.reshape(normed_H, [BLOCK // TILE, TILE]))
    column_kC = tile_k[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(codes_ptr + row * size + column_kC, cast(values_kC, tl.float8e4nv), mask=column_kC < size)
    tl.store(scale_ptr + row + tile_k.to(tl.int64) * scale_stride, scale_k, mask=tile_k * TILE < size)
