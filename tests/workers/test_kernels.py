"""Every kernel against its plain reference, on random and odd shapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.kernels import reference
from workers.kernels.decode_attention import decode_attention
from workers.kernels.dequant import dequantize_into
from workers.kernels.gate import choose_experts, choose_experts_normalized
from workers.kernels.linear import empty_weight, linear
from workers.kernels.moe import apply_experts
from workers.kernels.norm import rms_norm
from workers.kernels.paged import read_blocks
from workers.kernels.prefill_attention import chunk_attention, prompt_attention
from workers.kernels.rope import rotate_into
from workers.kernels.swiglu import swiglu

SEEDS = st.integers(0, 2**31)


def close(got: Tensor, want: Tensor) -> None:
    """fp32 sums in another order differ in the last bits."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    origin=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=SEEDS,
)
def test_dequantisation_is_exact_at_any_origin(
    rows: int, cols: int, block: tuple[int, int], origin: tuple[int, int], seed: int
) -> None:
    origin = (origin[0] % block[0], origin[1] % block[1])
    bits = torch.randint(0, 256, (rows, cols), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    tiles = [-(-(size + first) // step) for size, first, step in zip((rows, cols), origin, block, strict=True)]
    scale = normal(seed, *tiles).abs().to(torch.bfloat16)
    got, want = torch.empty(rows, cols), torch.empty(rows, cols)

    dequantize_into(got, bits, scale, block=block, origin=origin)

    reference.dequantize_into(want, bits, scale, block=block, origin=origin)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_dequantisation_covers_every_e4m3_value_without_nan() -> None:
    bits = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8).view(2, -1)
    got = torch.empty(bits.shape)
    dequantize_into(got, bits, torch.ones(1, 1), block=(128, 128), origin=(0, 0))
    assert torch.equal(got, bits.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (33, 130, 65)])
def test_linear_equals_its_reference(shape: tuple[int, int, int]) -> None:
    rows, size_in, size_out = shape
    x, weight = normal(0, rows, size_in), normal(1, size_out, size_in)
    close(linear(x, weight), reference.linear(x, weight))
    close(linear(x, empty_weight((size_out, size_in), x.dtype, x.device).copy_(weight)), reference.linear(x, weight))


@pytest.mark.parametrize("shape", [(1, 1), (5, 3, 7), (2, 256)])
def test_rms_norm_equals_its_reference(shape: tuple[int, ...]) -> None:
    x, weight = normal(0, *shape), normal(1, shape[-1])
    close(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    close(rms_norm(torch.zeros(shape), weight, 1e-6), torch.zeros(shape))


@pytest.mark.parametrize(("num_tokens", "num_heads", "head_dim"), [(1, 1, 2), (5, 3, 6), (7, 6, 128)])
def test_rotation_equals_its_reference(num_tokens: int, num_heads: int, head_dim: int) -> None:
    angles = normal(1, num_tokens, 1, head_dim // 2).repeat(1, 1, 2)
    signed_sin = angles.sin()
    signed_sin[..., : head_dim // 2] *= -1
    x = normal(0, num_tokens, num_heads, head_dim)
    got, want = torch.empty_like(x), torch.empty_like(x)
    rotate_into(got, x, angles.cos(), signed_sin)
    reference.rotate_into(want, x, angles.cos(), signed_sin)
    close(got, want)


@pytest.mark.parametrize("shape", [(1, 2), (5, 14), (3, 256)])
def test_swiglu_equals_its_reference(shape: tuple[int, int]) -> None:
    x = normal(0, *shape)
    close(swiglu(x), reference.swiglu(x))


@pytest.mark.parametrize("name", ["choose_experts", "choose_experts_normalized"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 1, 1), (7, 5, 2), (33, 128, 8)])
def test_expert_choice_equals_its_reference(name: str, num_tokens: int, num_experts: int, top_k: int) -> None:
    kernel = {"choose_experts": choose_experts, "choose_experts_normalized": choose_experts_normalized}[name]
    logits = normal(0, num_tokens, num_experts)
    ids, weights = kernel(logits, top_k)
    want_ids, want_weights = getattr(reference, name)(logits, top_k)
    assert torch.equal(ids, want_ids)
    close(weights, want_weights)


@pytest.mark.parametrize("num_tokens", [1, 2, 19])
@pytest.mark.parametrize(("first", "num_local"), [(0, 5), (0, 2), (2, 3), (4, 1)])
def test_experts_equal_their_reference_on_any_part_of_them(num_tokens: int, first: int, num_local: int) -> None:
    hidden, ffn, top_k = 24, 10, 2
    ids, weights = choose_experts(normal(0, num_tokens, 5), top_k)
    x, gate_up = normal(1, num_tokens, hidden), normal(2, num_local, 2 * ffn, hidden)
    down = normal(3, num_local, hidden, ffn)
    got = apply_experts(x, ids, weights, gate_up, down, first)
    close(got, reference.apply_experts(x, ids, weights, gate_up, down, first))


def test_tokens_without_local_experts_add_nothing() -> None:
    ids, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    got = apply_experts(normal(0, 3, 4), ids, weights, normal(1, 2, 6, 4), normal(2, 2, 4, 3), 7)
    assert torch.equal(got, torch.zeros(3, 4))


@pytest.mark.parametrize("blocks", [torch.tensor([3, 0, 4]), slice(1, 4)], ids=["scattered", "in a row"])
def test_blocks_read_equal_their_reference(blocks: Tensor | slice) -> None:
    pool = normal(0, 4, 6, 3, 8)
    assert torch.equal(read_blocks(pool, blocks), reference.read_blocks(pool, blocks))


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    block_size=st.sampled_from([1, 4, 16]),
    seed=SEEDS,
)
def test_decode_attention_equals_its_reference(
    lengths: list[int], num_kv_heads: int, group: int, block_size: int, seed: int
) -> None:
    num_keys = max(lengths)
    num_blocks = -(-num_keys // block_size)
    pool = normal(seed, 2 * num_kv_heads, 50, block_size, 8)
    q = normal(seed + 1, len(lengths), num_kv_heads * group, 8)
    blocks = torch.randint(0, 50, (len(lengths) * num_blocks,), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(lengths), 1, num_keys)
    for row, length in enumerate(lengths):
        mask[row, :, length:] = -math.inf
    for some_mask in (mask, None):
        got = decode_attention(q, pool, blocks, num_keys, some_mask)
        close(got, reference.decode_attention(q, pool, blocks, num_keys, some_mask))


@settings(max_examples=25, deadline=None)
@given(
    num_seqs=st.integers(1, 4),
    size=st.integers(1, 30),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    seed=SEEDS,
)
def test_prompt_attention_equals_its_reference(
    num_seqs: int, size: int, num_kv_heads: int, group: int, seed: int
) -> None:
    q = normal(seed, num_seqs * size, num_kv_heads * group, 8)
    kv = normal(seed + 1, num_seqs * size, 2 * num_kv_heads, 8)
    close(prompt_attention(q, kv, num_seqs), reference.prompt_attention(q, kv, num_seqs))


@settings(max_examples=25, deadline=None)
@given(
    start=st.integers(0, 30),
    size=st.integers(1, 30),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    block_size=st.sampled_from([1, 4, 16]),
    seed=SEEDS,
)
def test_chunk_attention_equals_its_reference(
    start: int, size: int, num_kv_heads: int, group: int, block_size: int, seed: int
) -> None:
    end = start + size
    pool = normal(seed, 2 * num_kv_heads, 70, block_size, 8)
    q = normal(seed + 1, size, num_kv_heads * group, 8)
    blocks = torch.randperm(70, generator=torch.Generator().manual_seed(seed))[: -(-end // block_size)]
    mask = torch.full((size, end), -math.inf).triu(start + 1)
    close(chunk_attention(q, pool, blocks, mask), reference.chunk_attention(q, pool, blocks, mask))
