"""Activations to e4m3 with a scale per row and 128 columns. R rows, I columns, k tiles of 128."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.numerics import TILE, cast, quantized
from workers.kernels.triton.rows import QuantizedRows

TILES_PER_PROGRAM = 8


def quantize(x_RI: Tensor) -> QuantizedRows:
    """Largest value of a tile becomes 448. I must be a multiple of 128."""
    num_rows, size = x_RI.shape
    out = QuantizedRows.empty(num_rows, size, x_RI.dtype, x_RI.device)
    num_tiles = size // TILE.value
    if num_rows:
        _quantize[(num_rows, triton.cdiv(num_tiles, TILES_PER_PROGRAM))](
            x_RI, x_RI.stride(0), out.codes_RI, out.scale_Rk, out.scale_Rk.stride(1), num_tiles, TILES_PER_PROGRAM
        )
    return out


@triton.jit(do_not_specialize=["scale_stride"])
def _quantize(x_ptr, x_stride, codes_ptr, scale_ptr, scale_stride, num_tiles, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile_k = tl.program_id(1) * TILES + tl.arange(0, TILES)
    column_kC = tile_k[:, None] * TILE + tl.arange(0, TILE)[None, :]
    is_there_k = tile_k < num_tiles
    x_kC = tl.load(x_ptr + row * x_stride + column_kC, mask=is_there_k[:, None], other=0.0).to(tl.float32)
    values_kC, scale_k = quantized(x_kC)
    codes_kC = cast(values_kC, tl.float8e4nv)
    tl.store(codes_ptr + row * num_tiles * TILE + column_kC, codes_kC, mask=is_there_k[:, None])
    tl.store(scale_ptr + row + tile_k.to(tl.int64) * scale_stride, scale_k, mask=is_there_k)
