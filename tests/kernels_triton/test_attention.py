"""Paged attention of decodes and of chunks, over KV in fp32, bf16 and FP8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install triton")

from tests.kernels_triton.values import DEVICE, accurate, normal
from workers.kernels.prefill_attention import Chunks
from workers.kernels.triton import prefill_attention as paged
from workers.kernels.triton import reference
from workers.kernels.triton.decode_attention import decode_attention, decode_attention_quantize
from workers.kernels.triton.prefill_attention import prefill_attention
from workers.kernels.triton.quantize import quantize

CASES = pytest.mark.parametrize(
    ("num_kv_heads", "group", "block_size", "head_dim", "kv_dtype"),
    [
        (1, 16, 4, 128, torch.float8_e4m3fn),
        (2, 8, 16, 64, torch.bfloat16),
        (1, 4, 16, 128, torch.float32),
        (3, 7, 1, 24, torch.float32),
        (2, 1, 8, 2, torch.bfloat16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)


def pool_of(num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return normal(3, 2 * num_kv_heads, 90, block_size, head_dim).to(dtype)


@CASES
def test_decode_attention_equals_its_reference(
    num_kv_heads: int, group: int, block_size: int, head_dim: int, kv_dtype: torch.dtype
) -> None:
    lengths = [1, 37, min(300, 90 * block_size)]
    tables = torch.stack([torch.randperm(90)[: -(-lengths[-1] // block_size)] for _ in lengths]).to(DEVICE)
    pool = pool_of(num_kv_heads, block_size, head_dim, kv_dtype)
    q, num_keys = normal(1, 3, num_kv_heads * group, head_dim), torch.tensor(lengths, device=DEVICE)
    got = decode_attention(q, pool, tables, num_keys, lengths[-1])
    accurate(got, reference.decode_attention(q, pool, tables, num_keys), 1e-5)


def test_a_sequence_has_the_same_bits_whatever_stands_beside_it() -> None:
    pool, q = pool_of(1, 16, 64, torch.float32), normal(1, 3, 4, 64)
    tables, num_keys = torch.arange(90, device=DEVICE).expand(3, -1), torch.tensor([400, 30, 1300], device=DEVICE)
    together = decode_attention(q, pool, tables, num_keys, 1300)
    for row, longest in ((0, 400), (1, 30), (1, 1440)):
        alone = decode_attention(q[row : row + 1], pool, tables[:1], num_keys[row : row + 1], longest)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention_that_leaves_fp8_rows_gives_the_bits_of_quantising_its_own(dtype: torch.dtype) -> None:
    pool, q = pool_of(2, 16, 128, dtype), normal(1, 3, 8, 128, dtype=dtype)
    tables, num_keys = torch.arange(90, device=DEVICE).expand(3, -1), torch.tensor([400, 1, 1300], device=DEVICE)
    got = decode_attention_quantize(q, pool, tables, num_keys, 1300)
    want = quantize(decode_attention(q, pool, tables, num_keys, 1300).flatten(1))
    assert torch.equal(got.codes_RI.view(torch.uint8), want.codes_RI.view(torch.uint8))
    assert torch.equal(got.scale_Rk, want.scale_Rk)


@CASES
def test_prefill_attention_equals_its_reference(
    num_kv_heads: int, group: int, block_size: int, head_dim: int, kv_dtype: torch.dtype
) -> None:
    pool, starts, sizes = pool_of(num_kv_heads, block_size, head_dim, kv_dtype), [30, 0, 50], [20, 1, 3]
    q, chunks = normal(1, sum(sizes), num_kv_heads * group, head_dim), chunks_of(starts, sizes, block_size)
    got = prefill_attention(q, pool, chunks.tables_CM, chunks.bounds_3C, sizes)
    want = [
        reference.chunk_attention(q_CND, pool, table_M[: -(-(start + len(q_CND)) // block_size)], start)
        for q_CND, table_M, start in zip(q.split(sizes), chunks.tables_CM, starts, strict=True)
    ]
    accurate(got, torch.cat(want), 1e-5)


def test_chunks_are_found_among_more_than_are_looked_through_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "BLOCK_CHUNKS", 2)
    pool, starts, sizes = pool_of(1, 16, 64, torch.float32), [3, 0, 20, 7, 0], [1, 70, 2, 33, 40]
    q, chunks = normal(1, sum(sizes), 4, 64), chunks_of(starts, sizes, 16)
    got = prefill_attention(q, pool, chunks.tables_CM, chunks.bounds_3C, sizes)
    monkeypatch.undo()
    assert torch.equal(got, prefill_attention(q, pool, chunks.tables_CM, chunks.bounds_3C, sizes))


def chunks_of(starts: list[int], sizes: list[int], block_size: int) -> Chunks:
    width = -(-max(start + size for start, size in zip(starts, sizes, strict=True)) // block_size)
    tables = torch.stack([torch.randperm(90)[:width] for _ in starts]).to(DEVICE)
    return Chunks(tables_CM=tables, starts=np.array(starts), sizes=np.array(sizes))


def test_queries_in_bf16_attend_as_their_values_do() -> None:
    pool, q = pool_of(1, 16, 64, torch.bfloat16), normal(1, 2, 4, 64, dtype=torch.bfloat16)
    tables, num_keys = torch.arange(6, device=DEVICE).expand(2, -1), torch.tensor([5, 90], device=DEVICE)
    got, want = decode_attention(q, pool, tables, num_keys, 90), reference.decode_attention(q, pool, tables, num_keys)
    accurate(got, want, 0.02)
    chunks = chunks_of([60], [2], 16)
    got = prefill_attention(q, pool, chunks.tables_CM, chunks.bounds_3C, [2])
    accurate(got, reference.chunk_attention(q, pool, chunks.tables_CM[0], 60), 0.02)
