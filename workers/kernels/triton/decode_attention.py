"""Attention of one new token per sequence over its paged KV: keys split over programs, then merged in order.

A split is a fixed number of keys, not a share of them, so that a sequence's bits depend on its own length alone. The
queries of a group share a KV head and ride as rows of one product, padded to the tensor core's 16. Where the product
behind it reads FP8 rows, merging leaves them so: a head of 128 is what shares a scale.
B sequences, N query heads, G kv heads, g queries of a group, D head_dim, S keys of a block of them, P splits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.numerics import TILE, TRITON_TYPES, cast, dot, quantized
from workers.kernels.triton.rows import QuantizedRows

SPLIT_KEYS = 256
BLOCK_KEYS = 64
LEAST_ROWS = 16
MERGED_SPLITS = 64
"""At a time: of 131,072 keys there are 512, and each round waits for memory once."""
LOG2_E = 1 / math.log(2)


def decode_attention(q_BND: Tensor, pool: Tensor, tables_BM: Tensor, num_keys_B: Tensor, longest: int) -> Tensor:
    """Attend each query to its own blocks of a pool [2G, num_blocks, block_size, D], K before V. Returns [B, N, D].

    `longest` bounds `num_keys_B`; a graph is captured with the bound of its bucket, and shorter ones cost little.
    """
    num_seqs, num_heads, head_dim = q_BND.shape
    out_BND = torch.empty(num_seqs, num_heads, head_dim, dtype=q_BND.dtype, device=q_BND.device)
    if num_seqs:
        splits = _attend(q_BND, pool, tables_BM, num_keys_B, longest)
        _merge[(num_seqs, num_heads)](
            *(*splits, num_keys_B, splits.peak_BNP.shape[2], out_BND),
            *(head_dim, triton.next_power_of_2(head_dim), SPLIT_KEYS, MERGED_SPLITS),
            num_warps=4,
        )
    return out_BND


def decode_attention_quantize(
    q_BND: Tensor, pool: Tensor, tables_BM: Tensor, num_keys_B: Tensor, longest: int
) -> QuantizedRows:
    """The same as the FP8 products read it, [B, N * D]; D must be 128."""
    num_seqs, num_heads, head_dim = q_BND.shape
    out = QuantizedRows.empty(num_seqs, num_heads * head_dim, q_BND.dtype, q_BND.device)
    if num_seqs:
        splits = _attend(q_BND, pool, tables_BM, num_keys_B, longest)
        _merge_quantize[(num_seqs, num_heads)](
            *(*splits, num_keys_B, splits.peak_BNP.shape[2], out.codes_RI, out.scale_Rk, out.scale_Rk.stride(1)),
            *(TRITON_TYPES[q_BND.dtype], SPLIT_KEYS, MERGED_SPLITS),
            num_warps=4,
        )
    return out


class _Splits(NamedTuple):
    """Of every query; P behind a sequence's end are undefined."""

    part_BNPD: Tensor
    peak_BNP: Tensor
    sum_BNP: Tensor


def _attend(q_BND: Tensor, pool: Tensor, tables_BM: Tensor, num_keys_B: Tensor, longest: int) -> _Splits:
    num_seqs, num_heads, head_dim = q_BND.shape
    num_kv_heads, block_size = pool.shape[0] // 2, pool.shape[2]
    group, num_splits = num_heads // num_kv_heads, triton.cdiv(longest, SPLIT_KEYS)
    part_BNPD = torch.empty(num_seqs, num_heads, num_splits, head_dim, dtype=torch.float32, device=q_BND.device)
    peak_BNP, sum_BNP = torch.empty(2, num_seqs, num_heads, num_splits, dtype=torch.float32, device=q_BND.device)
    _attend_split[(num_seqs, num_kv_heads, num_splits)](
        *(q_BND, q_BND.stride(0), pool, pool.stride(0), tables_BM, tables_BM.stride(0), num_keys_B),
        *(part_BNPD, peak_BNP, sum_BNP, LOG2_E / math.sqrt(head_dim), num_kv_heads),
        *(group, max(LEAST_ROWS, triton.next_power_of_2(group)), head_dim, triton.next_power_of_2(head_dim)),
        *(block_size, SPLIT_KEYS, BLOCK_KEYS),
        num_warps=4,
        num_stages=3,
    )
    return _Splits(part_BNPD, peak_BNP, sum_BNP)


@triton.jit(do_not_specialize=["tables_stride"])
def _attend_split(
    q_ptr,
    q_stride,
    pool_ptr,
    pool_stride,
    tables_ptr,
    tables_stride,
    num_keys_ptr,
    part_ptr,
    peak_ptr,
    sum_ptr,
    scale,
    num_kv_heads,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_keys, num_splits = tl.load(num_keys_ptr + sequence).to(tl.int32), tl.num_programs(2)
    start = split * SPLIT_KEYS
    if start >= num_keys:
        return
    row_g, column_D = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    is_row_g, is_column_D = row_g < GROUP, column_D < DIM
    head_g = kv_head * GROUP + row_g
    q_ptr_gD = q_ptr + sequence * q_stride + head_g[:, None] * DIM + column_D[None, :]
    q_gD = tl.load(q_ptr_gD, mask=is_row_g[:, None] & is_column_D[None, :], other=0.0)
    key_ptr = pool_ptr + kv_head * pool_stride
    value_ptr = pool_ptr + (num_kv_heads + kv_head) * pool_stride
    peak_g = tl.full((ROWS,), -float("inf"), tl.float32)
    sum_g = tl.zeros((ROWS,), tl.float32)
    part_gD = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(start, tl.minimum(start + SPLIT_KEYS, num_keys), BLOCK_KEYS):
        key_S = first + tl.arange(0, BLOCK_KEYS)
        is_key_S = key_S < num_keys
        block_S = tl.load(tables_ptr + sequence * tables_stride + key_S // BLOCK_SIZE, mask=is_key_S, other=0)
        cell_S = block_S.to(tl.int64) * BLOCK_SIZE + key_S % BLOCK_SIZE
        k_ptr_DS, is_k_DS = (
            key_ptr + cell_S[None, :] * DIM + column_D[:, None],
            is_column_D[:, None] & is_key_S[None, :],
        )
        k_DS = tl.load(k_ptr_DS, mask=is_k_DS, other=0.0)
        v_ptr_SD, is_v_SD = (
            value_ptr + cell_S[:, None] * DIM + column_D[None, :],
            is_key_S[:, None] & is_column_D[None, :],
        )
        v_SD = tl.load(v_ptr_SD, mask=is_v_SD, other=0.0)
        score_gS = tl.where(is_key_S[None, :], dot(q_gD, k_DS.to(q_gD.dtype)) * scale, -float("inf"))
        new_peak_g = tl.maximum(peak_g, tl.max(score_gS, axis=1))
        weight_gS = tl.exp2(score_gS - new_peak_g[:, None])
        fade_g = tl.exp2(peak_g - new_peak_g)
        sum_g = sum_g * fade_g + tl.sum(weight_gS, axis=1)
        part_gD = part_gD * fade_g[:, None] + dot(cast(weight_gS, q_gD.dtype), v_SD.to(q_gD.dtype))
        peak_g = new_peak_g
    at_g = (sequence * num_kv_heads * GROUP + head_g) * num_splits + split
    tl.store(peak_ptr + at_g, peak_g, mask=is_row_g)
    tl.store(sum_ptr + at_g, sum_g, mask=is_row_g)
    tl.store(part_ptr + at_g[:, None] * DIM + column_D[None, :], part_gD, mask=is_row_g[:, None] & is_column_D[None, :])


@triton.jit
def _merged(
    part_ptr,
    peak_ptr,
    sum_ptr,
    num_keys_ptr,
    num_splits,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = sequence * tl.num_programs(1) + head
    column_D = tl.arange(0, BLOCK_D)
    is_column_D = column_D < DIM
    peak, total, out_D = -float("inf"), 0.0, tl.zeros((BLOCK_D,), tl.float32)
    own_splits = tl.cdiv(tl.load(num_keys_ptr + sequence).to(tl.int32), SPLIT_KEYS)
    for first in range(0, own_splits, SPLITS):
        split_P = first + tl.arange(0, SPLITS)
        is_split_P = split_P < own_splits
        at_P = row * num_splits + split_P
        peak_P = tl.load(peak_ptr + at_P, mask=is_split_P, other=-float("inf"))
        new_peak = tl.maximum(peak, tl.max(peak_P, axis=0))
        weight_P, fade = tl.exp2(peak_P - new_peak), tl.exp2(peak - new_peak)
        total = total * fade + tl.sum(tl.load(sum_ptr + at_P, mask=is_split_P, other=0.0) * weight_P, axis=0)
        part_ptr_PD = part_ptr + at_P[:, None] * DIM + column_D[None, :]
        part_PD = tl.load(part_ptr_PD, mask=is_split_P[:, None] & is_column_D[None, :], other=0.0)
        out_D = out_D * fade + tl.sum(part_PD * weight_P[:, None], axis=0)
        peak = new_peak
    return out_D / total


@triton.jit(do_not_specialize=["num_splits"])
def _merge(
    part_ptr,
    peak_ptr,
    sum_ptr,
    num_keys_ptr,
    num_splits,
    out_ptr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    out_D = _merged(part_ptr, peak_ptr, sum_ptr, num_keys_ptr, num_splits, DIM, BLOCK_D, SPLIT_KEYS, SPLITS)
    row, column_D = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1), tl.arange(0, BLOCK_D)
    tl.store(out_ptr + row * DIM + column_D, cast(out_D, out_ptr.dtype.element_ty), mask=column_D < DIM)


@triton.jit(do_not_specialize=["num_splits", "scale_stride"])
def _merge_quantize(
    part_ptr,
    peak_ptr,
    sum_ptr,
    num_keys_ptr,
    num_splits,
    codes_ptr,
    scale_ptr,
    scale_stride,
    DTYPE: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    out_D = _merged(part_ptr, peak_ptr, sum_ptr, num_keys_ptr, num_splits, TILE, TILE, SPLIT_KEYS, SPLITS)
    sequence, head, tile_k = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, 1)
    # Rounded as where it is stored before it is quantised.
    values_kD, scale_k = quantized(tl.reshape(cast(out_D, DTYPE).to(tl.float32), [1, TILE]))
    column_kD = (head + tile_k)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(codes_ptr + sequence * tl.num_programs(1) * TILE + column_kD, cast(values_kD, tl.float8e4nv))
    tl.store(scale_ptr + sequence + (head + tile_k).to(tl.int64) * scale_stride, scale_k)
