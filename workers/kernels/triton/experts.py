"""The products of a rank's experts with the rows that chose them: one launch for all experts, counts on the device.

A fixed number of programs takes block after block of (expert, its rows, its outputs): few rows per expert in decode,
many in prefill. T tokens, R places of rows sorted by expert, O outputs, I inputs, e local experts, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels import deep_gemm_experts
from workers.kernels.invariance import is_invariant
from workers.kernels.tiles import TILE, TileWeight
from workers.kernels.triton.combine import combine
from workers.kernels.triton.gemm import BLOCK_O, NUM_PROGRAMS, Blocks, num_splits
from workers.kernels.triton.numerics import cast, dot
from workers.kernels.triton.quantize import quantize
from workers.kernels.triton.route import Routes, route
from workers.kernels.triton.rows import QuantizedRows
from workers.kernels.triton.swiglu import swiglu, swiglu_quantize

PREFILL_PAIRS_PER_EXPERT = 32
"""From which blocks are wide, and splits are computed one after another."""


def blocks_of(num_pairs: int, num_local: int, splits: int) -> Blocks:
    """By the number of pairs: which programs compute what changes no bit of it; as `gemm.blocks_of`."""
    if is_invariant():
        return Blocks(outputs=BLOCK_O, rows=16, splits=1, warps=4)
    if num_pairs > PREFILL_PAIRS_PER_EXPERT * num_local:
        return Blocks(outputs=128, rows=64, splits=splits, warps=8)
    return Blocks(outputs=BLOCK_O, rows=16, splits=1, warps=4)


def apply_experts(
    x_TH: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    gate_up_eXH: Tensor | TileWeight,
    down_eHF: Tensor | TileWeight,
    first_slot: int,
    loads_e: Tensor | None = None,
    quantized: QuantizedRows | None = None,
) -> Tensor:
    """Sum over each token's local experts of weight * expert(x), in the order of its choices; zeros without any.

    `loads_e`, int64: the number of tokens of each local expert is added to it. `quantized`: x_TH for tiles, where it is
    there already.
    """
    library = deep_gemm_experts.library_for(x_TH, gate_up_eXH, down_eHF)
    if library is not None and isinstance(gate_up_eXH, TileWeight) and isinstance(down_eHF, TileWeight):
        return deep_gemm_experts.apply_experts(
            library, x_TH, slots_TK, weights_TK, gate_up_eXH, down_eHF, first_slot, loads_e, quantized
        )
    return own_experts(x_TH, slots_TK, weights_TK, gate_up_eXH, down_eHF, first_slot, loads_e, quantized)


def own_experts(
    x_TH: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    gate_up_eXH: Tensor | TileWeight,
    down_eHF: Tensor | TileWeight,
    first_slot: int,
    loads_e: Tensor | None = None,
    quantized: QuantizedRows | None = None,
) -> Tensor:
    """The same by this file's kernel, whatever is installed."""
    num_local, top_k = gate_up_eXH.shape[0], slots_TK.shape[1]
    routes = route(slots_TK, first_slot, num_local, loads_e)
    if isinstance(gate_up_eXH, TileWeight):
        rows = quantize(x_TH) if quantized is None else quantized
        gate_up_SRX = grouped_linear(rows, gate_up_eXH, routes, top_k)
        hidden: Tensor | QuantizedRows = swiglu_quantize(gate_up_SRX, x_TH.dtype, routes.starts_e[-1:])
    else:
        gate_up_SRX = grouped_linear(x_TH, gate_up_eXH, routes, top_k)
        hidden = swiglu(gate_up_SRX, x_TH.dtype, routes.starts_e[-1:])
    y_SRH = grouped_linear(hidden, down_eHF, routes, None)
    return combine(y_SRH, slots_TK, weights_TK, routes.place_P, first_slot, num_local, x_TH.dtype)


def grouped_linear(
    x: Tensor | QuantizedRows, weight_eOI: Tensor | TileWeight, routes: Routes, top_k: int | None
) -> Tensor:
    """Each place's row times its expert's weight: [S, R, O], to be summed over S in order.

    With `top_k`, x has a row per token, and a place takes its token's; without, x has a row per place.
    """
    num_local, num_outputs, size_in = weight_eOI.shape
    num_pairs = len(routes.pair_P)
    splits = num_splits(num_outputs, size_in)
    blocks = blocks_of(num_pairs, num_local, splits)
    stored = splits // blocks.splits
    values, scale_Rk = (x.codes_RI, x.scale_Rk) if isinstance(x, QuantizedRows) else (x, None)
    codes, scale_ok = (
        (weight_eOI.codes_OI, weight_eOI.scale_ok) if isinstance(weight_eOI, TileWeight) else (weight_eOI, None)
    )
    out_dtype = x.dtype if stored == 1 else torch.float32
    out_SRO = torch.empty(stored, num_pairs, num_outputs, dtype=out_dtype, device=values.device)
    most_blocks = min(num_pairs, triton.cdiv(num_pairs, blocks.rows) + num_local)
    most_programs = most_blocks * triton.cdiv(num_outputs, blocks.outputs) * stored
    if num_pairs:
        _grouped_gemm[(min(2 * NUM_PROGRAMS, most_programs),)](
            *(values, values.stride(0), scale_Rk, 0 if scale_Rk is None else scale_Rk.stride(1)),
            *(codes, *codes.stride(), scale_ok, out_SRO, routes.starts_e, routes.pair_P),
            *(num_pairs, num_outputs, size_in, num_local, top_k, triton.next_power_of_2(num_local)),
            *(blocks.outputs, blocks.rows, splits, blocks.splits, TILE),
            num_warps=blocks.warps,
            num_stages=4,
        )
    return out_SRO


@triton.jit(do_not_specialize=["num_places", "x_scale_stride"])
def _grouped_gemm(
    x_ptr,
    x_stride,
    x_scale_ptr,
    x_scale_stride,
    weight_ptr,
    weight_stride_e,
    weight_stride_o,
    weight_stride_i,
    weight_scale_ptr,
    out_ptr,
    starts_ptr,
    pair_ptr,
    num_places,
    num_outputs,
    size_in,
    num_local,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    OWN_SPLITS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    expert_e = tl.arange(0, EXPERTS)
    start_e = tl.load(starts_ptr + expert_e, mask=expert_e < num_local, other=0)
    stop_e = tl.load(starts_ptr + 1 + expert_e, mask=expert_e < num_local, other=0)
    last_block_e = tl.cumsum(tl.cdiv(stop_e - start_e, BLOCK_R), axis=0)
    num_blocks = tl.max(last_block_e, axis=0)
    blocks_of_outputs = tl.cdiv(num_outputs, BLOCK_O)
    num_tiles = tl.cdiv(size_in, BLOCK_I)
    column_I = tl.arange(0, BLOCK_I)
    STORED: tl.constexpr = SPLITS // OWN_SPLITS
    for work in range(tl.program_id(0), num_blocks * blocks_of_outputs * STORED, tl.num_programs(0)):
        block, rest = work // (blocks_of_outputs * STORED), work % (blocks_of_outputs * STORED)
        block_o, stored = rest // STORED, rest % STORED
        expert = tl.sum((last_block_e <= block).to(tl.int32), axis=0)
        first_block = tl.max(tl.where(last_block_e <= block, last_block_e, 0), axis=0)
        is_expert_e = expert_e == expert
        start = tl.sum(tl.where(is_expert_e, start_e, 0), axis=0)
        stop = tl.sum(tl.where(is_expert_e, stop_e, 0), axis=0)
        place_R = start + (block - first_block) * BLOCK_R + tl.arange(0, BLOCK_R)
        is_row_R = place_R < stop
        row_R = place_R
        if TOP_K is not None:
            row_R = tl.load(pair_ptr + place_R, mask=is_row_R, other=0) // TOP_K
        output_O = block_o * BLOCK_O + tl.arange(0, BLOCK_O)
        is_output_O = output_O < num_outputs
        expert_ptr = weight_ptr + expert.to(tl.int64) * weight_stride_e
        weight_ptr_OI = expert_ptr + output_O[:, None] * weight_stride_o + column_I[None, :] * weight_stride_i
        x_ptr_IR = x_ptr + row_R.to(tl.int64)[None, :] * x_stride + column_I[:, None]
        sum_OR = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
        for split in range(stored * OWN_SPLITS, (stored + 1) * OWN_SPLITS):
            part_OR = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
            for tile in range(split * num_tiles // SPLITS, (split + 1) * num_tiles // SPLITS):
                is_column_I = tile * BLOCK_I + column_I < size_in
                is_weight_OI = is_output_O[:, None] & is_column_I[None, :]
                is_x_IR = is_column_I[:, None] & is_row_R[None, :]
                weight_OI = tl.load(weight_ptr_OI + tile * BLOCK_I * weight_stride_i, mask=is_weight_OI, other=0.0)
                x_IR = tl.load(x_ptr_IR + tile * BLOCK_I, mask=is_x_IR, other=0.0)
                if x_scale_ptr is not None:
                    scale_R = tl.load(x_scale_ptr + row_R + tile * x_scale_stride, mask=is_row_R, other=0.0)
                    tile_row = expert * tl.cdiv(num_outputs, BLOCK_I) + block_o * BLOCK_O // BLOCK_I
                    scale_R *= tl.load(weight_scale_ptr + tile_row * num_tiles + tile)
                    part_OR += dot(weight_OI, x_IR) * scale_R[None, :]
                else:
                    part_OR += dot(weight_OI, x_IR)
            sum_OR += part_OR
        at_OR = (stored * num_places + place_R).to(tl.int64)[None, :] * num_outputs + output_O[:, None]
        is_stored_OR = is_output_O[:, None] & is_row_R[None, :]
        tl.store(out_ptr + at_OR, cast(sum_OR, out_ptr.dtype.element_ty), mask=is_stored_OR)
