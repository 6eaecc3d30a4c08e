"""Causal attention of chunks of known tokens over their sequences' paged KV, their own tokens among it.

One launch for all chunks of a step. The queries of a group share a KV head: a block of rows is some tokens times their
group. T tokens of all chunks, C chunks, N query heads, G kv heads, D head_dim, Q rows of a block, S keys of a block.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.decode_attention import LOG2_E
from workers.kernels.triton.numerics import cast, dot

BLOCK_ROWS = 128
BLOCK_KEYS = 64
BLOCK_CHUNKS = 256
"""Looked through at a time, for a program's own: about all that a step has."""


def prefill_attention(q_TND: Tensor, pool: Tensor, tables_CM: Tensor, bounds_3C: Tensor, sizes: list[int]) -> Tensor:
    """Attend each token to its sequence up to itself. Returns [T, N, D].

    `bounds_3C`: the chunks' first positions, first rows and sizes, int64; `sizes`: what the host knows of them. The
    pool is [2G, num_blocks, block_size, D], K before V, and holds the chunks' own K and V.
    """
    num_tokens, num_heads, head_dim = q_TND.shape
    num_kv_heads = pool.shape[0] // 2
    group = num_heads // num_kv_heads
    rows_per_token = triton.next_power_of_2(group)
    tokens = max(1, BLOCK_ROWS // rows_per_token)
    out_TND = torch.empty(num_tokens, num_heads, head_dim, dtype=q_TND.dtype, device=q_TND.device)
    num_blocks = sum(triton.cdiv(size, tokens) for size in sizes)
    if num_blocks:
        _attend_chunks[(num_blocks, num_kv_heads)](
            *(q_TND, q_TND.stride(0), pool, pool.stride(0), tables_CM, tables_CM.stride(0), bounds_3C, len(sizes)),
            *(out_TND, LOG2_E / math.sqrt(head_dim), num_kv_heads, BLOCK_CHUNKS),
            *(group, rows_per_token, tokens, head_dim, triton.next_power_of_2(head_dim), pool.shape[2], BLOCK_KEYS),
            num_warps=8,
            num_stages=2,
        )
    return out_TND


@triton.jit(do_not_specialize=["tables_stride", "num_chunks"])
def _attend_chunks(
    q_ptr,
    q_stride,
    pool_ptr,
    pool_stride,
    tables_ptr,
    tables_stride,
    bounds_ptr,
    num_chunks,
    out_ptr,
    scale,
    num_kv_heads,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS_PER_TOKEN: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    # The last tokens of a chunk see most keys: they begin first.
    block, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    chunk, first_block, num_blocks = 0, 0, 0
    for first in range(0, num_chunks, CHUNKS):
        chunk_C = first + tl.arange(0, CHUNKS)
        size_C = tl.load(bounds_ptr + 2 * num_chunks + chunk_C, mask=chunk_C < num_chunks, other=0).to(tl.int32)
        last_block_C = num_blocks + tl.cumsum(tl.cdiv(size_C, TOKENS), axis=0)
        chunk += tl.sum((last_block_C <= block).to(tl.int32), axis=0)
        first_block = tl.maximum(first_block, tl.max(tl.where(last_block_C <= block, last_block_C, 0), axis=0))
        num_blocks = tl.max(last_block_C, axis=0)
    block -= first_block
    start, first_row = tl.load(bounds_ptr + chunk).to(tl.int32), tl.load(bounds_ptr + num_chunks + chunk)
    size = tl.load(bounds_ptr + 2 * num_chunks + chunk).to(tl.int32)
    table_ptr = tables_ptr + chunk * tables_stride
    row_Q, column_D = tl.arange(0, TOKENS * ROWS_PER_TOKEN), tl.arange(0, BLOCK_D)
    token_Q, in_group_Q = block * TOKENS + row_Q // ROWS_PER_TOKEN, row_Q % ROWS_PER_TOKEN
    is_row_Q, is_column_D = (token_Q < size) & (in_group_Q < GROUP), column_D < DIM
    head_Q = kv_head * GROUP + in_group_Q
    is_q_QD = is_row_Q[:, None] & is_column_D[None, :]
    q_ptr_QD = q_ptr + (first_row + token_Q)[:, None] * q_stride + head_Q[:, None] * DIM + column_D[None, :]
    q_QD = tl.load(q_ptr_QD, mask=is_q_QD, other=0.0)
    key_ptr = pool_ptr + kv_head * pool_stride
    value_ptr = pool_ptr + (num_kv_heads + kv_head) * pool_stride
    peak_Q = tl.full((TOKENS * ROWS_PER_TOKEN,), -float("inf"), tl.float32)
    sum_Q = tl.zeros((TOKENS * ROWS_PER_TOKEN,), tl.float32)
    out_QD = tl.zeros((TOKENS * ROWS_PER_TOKEN, BLOCK_D), tl.float32)
    num_keys = start + tl.minimum(size, (block + 1) * TOKENS)
    for first in range(0, num_keys, BLOCK_KEYS):
        key_S = first + tl.arange(0, BLOCK_KEYS)
        is_key_S = key_S < num_keys
        block_S = tl.load(table_ptr + key_S // BLOCK_SIZE, mask=is_key_S, other=0)
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
        # Every row sees the first key, so that no row's peak stays at -inf; rows that are padding see it, too.
        is_seen_QS = key_S[None, :] <= (start + token_Q)[:, None]
        score_QS = tl.where(is_seen_QS & is_key_S[None, :], dot(q_QD, k_DS.to(q_QD.dtype)) * scale, -float("inf"))
        new_peak_Q = tl.maximum(peak_Q, tl.max(score_QS, axis=1))
        weight_QS = tl.exp2(score_QS - new_peak_Q[:, None])
        fade_Q = tl.exp2(peak_Q - new_peak_Q)
        sum_Q = sum_Q * fade_Q + tl.sum(weight_QS, axis=1)
        out_QD = out_QD * fade_Q[:, None] + dot(cast(weight_QS, q_QD.dtype), v_SD.to(q_QD.dtype))
        peak_Q = new_peak_Q
    out_ptr_QD = out_ptr + ((first_row + token_Q)[:, None] * (num_kv_heads * GROUP) + head_Q[:, None]) * DIM
    out_QD = cast(out_QD / sum_Q[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr_QD + column_D[None, :], out_QD, mask=is_q_QD)
