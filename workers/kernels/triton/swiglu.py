"""The gated activation behind the gate and up product: sums its splits, and quantises for the down product.

S splits of the product's inputs, R rows, F columns of gate and as many of up behind them, k tiles of 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.numerics import TILE, TRITON_TYPES, cast, quantized
from workers.kernels.triton.rows import QuantizedRows

BLOCK = 1024
TILES_PER_PROGRAM = 4


def swiglu(gate_up_SRX: Tensor, dtype: torch.dtype, num_rows: Tensor | None = None) -> Tensor:
    """silu(gate) * up of the sum over splits, in `dtype`, [R, F]; rows from `num_rows` on, where given, are left."""
    splits, rows, size = gate_up_SRX.shape[0], gate_up_SRX.shape[1], gate_up_SRX.shape[2] // 2
    out_RF = torch.empty(rows, size, dtype=dtype, device=gate_up_SRX.device)
    if rows:
        _swiglu[(rows, triton.cdiv(size, BLOCK))](gate_up_SRX, out_RF, num_rows, rows, size, splits, BLOCK)
    return out_RF


def swiglu_quantize(
    gate_up_SRX: Tensor, dtype: torch.dtype, counts: Tensor | None = None, group_rows: int | None = None
) -> QuantizedRows:
    """`swiglu` of gate and up in `dtype`, as the FP8 products read it. F must be a multiple of 128.

    `group_rows`: rows come in groups of so many, of which the first `counts` are computed and the scales lie together;
    None: all are one group.
    """
    splits, rows, size = gate_up_SRX.shape[0], gate_up_SRX.shape[1], gate_up_SRX.shape[2] // 2
    out = QuantizedRows.empty(rows, size, dtype, gate_up_SRX.device)
    num_tiles = size // TILE.value
    if rows:
        _swiglu_quantize[(rows, triton.cdiv(num_tiles, TILES_PER_PROGRAM))](
            *(gate_up_SRX, out.codes_RI, out.scale_Rk, group_rows or out.scale_Rk.stride(1)),
            *(counts, rows, num_tiles, splits, TILES_PER_PROGRAM, TRITON_TYPES[dtype]),
        )
    return out


@triton.jit
def _activated(gate_up_ptr, row, column, is_there, num_rows, size, SPLITS: tl.constexpr, DTYPE: tl.constexpr):
    gate, up = tl.zeros(column.shape, tl.float32), tl.zeros(column.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        start_ptr = gate_up_ptr + (split * num_rows + row) * 2 * size + column
        gate += tl.load(start_ptr, mask=is_there, other=0.0).to(tl.float32)
        up += tl.load(start_ptr + size, mask=is_there, other=0.0).to(tl.float32)
    # As a product stores it that needs no sum over splits.
    gate, up = cast(gate, DTYPE).to(tl.float32), cast(up, DTYPE).to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu(gate_up_ptr, out_ptr, count_ptr, num_rows, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    row, column_F = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there_F = column_F < size
    if count_ptr is not None:
        is_there_F = is_there_F & (row < tl.load(count_ptr))
    out_F = _activated(gate_up_ptr, row, column_F, is_there_F, num_rows, size, SPLITS, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * size + column_F, cast(out_F, out_ptr.dtype.element_ty), mask=is_there_F)


@triton.jit(do_not_specialize=["num_rows", "group_rows"])
def _swiglu_quantize(
    gate_up_ptr,
    codes_ptr,
    scale_ptr,
    group_rows,
    count_ptr,
    num_rows,
    num_tiles,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group, row_of_group = row // group_rows, row % group_rows
    tile_k = tl.program_id(1) * TILES + tl.arange(0, TILES)
    is_there_k = tile_k < num_tiles
    if count_ptr is not None:
        is_there_k = is_there_k & (row_of_group < tl.load(count_ptr + group))
    column_kC = tile_k[:, None] * TILE + tl.arange(0, TILE)[None, :]
    size = num_tiles * TILE
    out_kC = _activated(gate_up_ptr, row, column_kC, is_there_k[:, None], num_rows, size, SPLITS, DTYPE)
    values_kC, scale_k = quantized(out_kC)
    codes_kC = cast(values_kC, tl.float8e4nv)
    tl.store(codes_ptr + row * size + column_kC, codes_kC, mask=is_there_k[:, None])
    scale_ptr += group * num_tiles * group_rows + row_of_group
    tl.store(scale_ptr + tile_k.to(tl.int64) * group_rows, scale_k, mask=is_there_k)
