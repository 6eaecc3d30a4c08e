"""Products with a block-FP8 weight: e4m3 rows times e4m3 tiles on the tensor cores, sums in fp32.

The weight takes the wide side of the tensor core's instruction and the rows its narrow side: a decode step has few.
Inputs are summed in splits, each by itself and then one after another; their number follows from the weight's shape
alone, so that a row's bits do not depend on the rows beside it. With few rows splits are computed side by side, which
keeps all processors busy; with many, one after another where their sum is kept.
R rows, O outputs, I inputs, k tiles of 128 inputs, S splits that are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels import deep_gemm, scaled_mm, tiles
from workers.kernels.invariance import is_invariant
from workers.kernels.tiles import TileWeight
from workers.kernels.triton.numerics import TILE, cast, dot
from workers.kernels.triton.rows import QuantizedRows

NUM_PROGRAMS = 264
"""Two for each of an H200's 132 processors; a constant, so that another GPU computes the same bits."""
MIN_SPLIT_TILES = 4
"""Inputs of a split: less would be more adding up than multiplying."""
MAX_SPLITS = 8
DECODE_ROWS = 64
"""Up to which splits are computed side by side; more rows are work enough."""
BLOCK_O = 64
"""Of a decode."""
SUM_BLOCK = 1024


@dataclass(frozen=True)
class Blocks:
    """What one program takes."""

    outputs: int
    rows: int
    splits: int
    """Of the weight's; the others are other programs'."""
    warps: int


def num_splits(num_outputs: int, size_in: int) -> int:
    """Of a weight's inputs: as many as give every processor two programs where rows are few."""
    wanted = -(-NUM_PROGRAMS // -(-num_outputs // BLOCK_O))
    return max(1, min(wanted, MAX_SPLITS, size_in // tiles.TILE // MIN_SPLIT_TILES))


def blocks_of(num_rows: int, splits: int) -> Blocks:
    """By the number of rows: which programs compute what changes no bit of it, as far as one can tell.

    A tensor core's instruction for another shape might add in another order, so a deterministic rank has one shape.
    """
    if is_invariant():
        return Blocks(outputs=BLOCK_O, rows=DECODE_ROWS, splits=splits if num_rows > DECODE_ROWS else 1, warps=4)
    if num_rows > DECODE_ROWS:
        return Blocks(outputs=128, rows=128, splits=splits, warps=8)
    return Blocks(outputs=BLOCK_O, rows=max(16, triton.next_power_of_2(num_rows)), splits=1, warps=4)


def linear(x: QuantizedRows, weight: TileWeight) -> Tensor:
    """x @ weight.T, [R, O]."""
    parts_SRO = partial_linear(x, weight)
    return parts_SRO[0] if len(parts_SRO) == 1 else sum_splits(parts_SRO, x.dtype)


def partial_linear(x: QuantizedRows, weight: TileWeight) -> Tensor:
    """x @ weight.T as [S, R, O] to be summed over S in order: fp32 where S is more than one."""
    library = deep_gemm.library_for(x, weight)
    if library is not None:
        return deep_gemm.linear(library, x, weight).unsqueeze(0)
    return scaled_mm.linear(x, weight).unsqueeze(0) if scaled_mm.is_chosen(x, weight) else own_product(x, weight)


def own_product(x: QuantizedRows, weight: TileWeight) -> Tensor:
    """The same by this file's kernel, whatever is installed."""
    (num_rows, size_in), (num_outputs, _) = x.codes_RI.shape, weight.shape
    splits = num_splits(weight.whole_rows, size_in)
    blocks = blocks_of(num_rows, splits)
    stored = splits // blocks.splits
    out_dtype = x.dtype if stored == 1 else torch.float32
    out_SRO = torch.empty(stored, num_rows, num_outputs, dtype=out_dtype, device=x.codes_RI.device)
    if num_rows:
        _fp8_gemm[(triton.cdiv(num_outputs, blocks.outputs), triton.cdiv(num_rows, blocks.rows), stored)](
            *(x.codes_RI, x.codes_RI.stride(0), x.scale_Rk, x.scale_Rk.stride(1)),
            *(weight.codes_OI, weight.scale_ok, out_SRO, num_rows, num_outputs, size_in // TILE.value),
            *(blocks.outputs, blocks.rows, splits, blocks.splits),
            num_warps=blocks.warps,
            num_stages=4,
        )
    return out_SRO


def sum_splits(parts_SRO: Tensor, dtype: torch.dtype) -> Tensor:
    """Over S, in order: [R, O]."""
    num_splits, *shape = parts_SRO.shape
    out_RO = torch.empty(shape, dtype=dtype, device=parts_SRO.device)
    if size := out_RO.numel():
        _sum_splits[(triton.cdiv(size, SUM_BLOCK),)](parts_SRO, out_RO, size, num_splits, SUM_BLOCK)
    return out_RO


@triton.jit(do_not_specialize=["num_rows", "x_scale_stride"])
def _fp8_gemm(
    x_ptr,
    x_stride,
    x_scale_ptr,
    x_scale_stride,
    weight_ptr,
    weight_scale_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    num_tiles,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    OWN_SPLITS: tl.constexpr,
):
    output_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_R = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_output_O, is_row_R = output_O < num_outputs, row_R < num_rows
    column_C = tl.arange(0, TILE)
    weight_ptr_OC = weight_ptr + output_O.to(tl.int64)[:, None] * (num_tiles * TILE) + column_C[None, :]
    x_ptr_CR = x_ptr + row_R.to(tl.int64)[None, :] * x_stride + column_C[:, None]
    weight_scale_ptr += tl.program_id(0) * BLOCK_O // TILE * num_tiles
    sum_OR = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    first_split = tl.program_id(2) * OWN_SPLITS
    for split in range(first_split, first_split + OWN_SPLITS):
        part_OR = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
        for tile in range(split * num_tiles // SPLITS, (split + 1) * num_tiles // SPLITS):
            weight_OC = tl.load(weight_ptr_OC + tile * TILE, mask=is_output_O[:, None], other=0.0)
            x_CR = tl.load(x_ptr_CR + tile * TILE, mask=is_row_R[None, :], other=0.0)
            scale_R = tl.load(x_scale_ptr + row_R + tile * x_scale_stride, mask=is_row_R, other=0.0)
            scale_R *= tl.load(weight_scale_ptr + tile)
            part_OR += dot(weight_OC, x_CR) * scale_R[None, :]
        sum_OR += part_OR
    at_OR = (tl.program_id(2) * num_rows + row_R).to(tl.int64)[None, :] * num_outputs + output_O[:, None]
    tl.store(out_ptr + at_OR, cast(sum_OR, out_ptr.dtype.element_ty), mask=is_output_O[:, None] & is_row_R[None, :])


@triton.jit
def _sum_splits(parts_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + tl.full((), split, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, cast(total, out_ptr.dtype.element_ty), mask=at < size)
