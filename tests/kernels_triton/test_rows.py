"""Kernels that take row by row: norms, activations, quantisation, rotary positions, the gate."""

from __future__ import annotations

import pytest
import torch

from workers.kernels import reference as plain

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install triton")

from tests.kernels_triton.values import DEVICE, accurate, normal, same_rows
from workers.kernels.gate import Replicas, slots_of_chosen
from workers.kernels.sums import PartialSums
from workers.kernels.triton import reference
from workers.kernels.triton.gate import choose_experts, choose_slots
from workers.kernels.triton.gemm import sum_splits
from workers.kernels.triton.norm import (
    add_rms_norm,
    add_rms_norm_both,
    add_rms_norm_quantize,
    rms_norm,
    rms_norm_quantize,
)
from workers.kernels.triton.qk_norm_rope import qk_norm_rope_store, sum_norm_rope_store
from workers.kernels.triton.quantize import quantize
from workers.kernels.triton.rows import QuantizedRows
from workers.kernels.triton.swiglu import swiglu, swiglu_quantize

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
EPS = 1e-6


def rounding(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 2**-7


@DTYPES
@pytest.mark.parametrize("shape", [(1, 128), (3, 384), (2, 1152)])
def test_quantised_rows_equal_their_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = normal(0, *shape, dtype=dtype) * 10
    x[0, :128] = 0
    same_rows(quantize(x), reference.quantize(x))


def test_every_size_of_value_is_rounded_as_torch_rounds_it() -> None:
    x = torch.cat([torch.linspace(-460, 460, 1023), torch.logspace(-12, 2, 1024), torch.tensor([448.0])])
    x = x.clamp(-448, 448).view(16, 128).to(DEVICE)
    x[:, 0] = 448  # the largest of each row, so that its scale is one
    got = quantize(x)
    assert torch.equal(got.codes_RI.float(), x.to(torch.float8_e4m3fn).float())


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 256), (2, 640)])
def test_norms_equal_their_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, delta, weight = (normal(seed, *shape[seed == 2 :], dtype=dtype) for seed in range(3))
    total = x + delta
    accurate(rms_norm(x, weight, EPS), plain.rms_norm(x.float(), weight.float(), EPS), rounding(dtype))
    got = add_rms_norm(x, delta, weight, EPS)
    accurate(got, plain.rms_norm(total.float(), weight.float(), EPS), rounding(dtype))
    assert torch.equal(x, total)


@DTYPES
def test_quantised_norms_equal_their_reference(dtype: torch.dtype) -> None:
    x, delta, weight = normal(0, 3, 384, dtype=dtype), normal(1, 3, 384, dtype=dtype), normal(2, 384, dtype=dtype)
    total = x + delta
    same_rows(rms_norm_quantize(x, weight, EPS), reference.quantize(plain.rms_norm(x.float(), weight.float(), EPS)))
    got = add_rms_norm_quantize(x, delta, weight, EPS)
    same_rows(got, reference.quantize(plain.rms_norm(total.float(), weight.float(), EPS)))
    assert torch.equal(x, total)


@DTYPES
def test_a_norm_for_two_readers_gives_the_bits_that_each_of_them_had_alone(dtype: torch.dtype) -> None:
    x, delta, weight = normal(0, 3, 384, dtype=dtype), normal(1, 3, 384, dtype=dtype), normal(2, 384, dtype=dtype)
    twin = x.clone()
    normed, codes = add_rms_norm_both(x, delta, weight, EPS)
    want = add_rms_norm(twin, delta, weight, EPS)
    assert torch.equal(x, twin)
    assert torch.equal(normed, want)
    assert torch.equal(codes.codes_RI.view(torch.uint8), quantize(want).codes_RI.view(torch.uint8))
    assert torch.equal(codes.scale_Rk, quantize(want).scale_Rk)


@DTYPES
def test_what_comes_in_parts_gives_the_bits_of_its_sum(dtype: torch.dtype) -> None:
    # Of magnitudes so different that every order of adding gives another sum.
    parts = torch.stack([normal(seed, 3, 384) * 8.0**seed for seed in range(7)])
    x, weight, total = normal(7, 3, 384, dtype=dtype), normal(8, 384, dtype=dtype), sum_splits(parts, dtype)
    for add in (add_rms_norm, add_rms_norm_quantize):
        got_x, want_x = x.clone(), x.clone()
        got, want = add(got_x, PartialSums(parts, dtype), weight, EPS), add(want_x, total, weight, EPS)
        assert torch.equal(got_x, want_x)
        if isinstance(got, QuantizedRows) and isinstance(want, QuantizedRows):
            got, want = got.dense(), want.dense()
        assert torch.equal(got, want)
    heads, norms = total.view(3, 6, 64), normal(9, 5, 64, dtype=dtype)
    pool, cells = torch.zeros(2, 5, 4, 64, dtype=dtype, device=DEVICE), torch.tensor([7, 0, 19], device=DEVICE)
    rotations, got_pool = normal(10, 3, 2, 64, dtype=dtype), pool.clone()
    got_heads = sum_norm_rope_store(parts, dtype, norms, EPS, rotations, got_pool, cells)
    qk_norm_rope_store(heads, norms, EPS, rotations, pool, cells)
    assert torch.equal(got_heads, heads)
    assert torch.equal(got_pool, pool)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("shape", [(1, 128), (5, 384)])
def test_the_activation_adds_splits_and_equals_its_reference(num_splits: int, shape: tuple[int, int]) -> None:
    gate_up = normal(0, num_splits, shape[0], 2 * shape[1])
    want = reference.swiglu(gate_up, torch.float32)
    accurate(swiglu(gate_up, torch.float32), want)
    same_rows(swiglu_quantize(gate_up, torch.float32), reference.quantize(want))


def test_the_activation_leaves_rows_behind_the_count() -> None:
    gate_up, count = normal(0, 1, 4, 256), torch.tensor([2], dtype=torch.int32, device=DEVICE)
    accurate(swiglu(gate_up, torch.float32, count)[:2], reference.swiglu(gate_up, torch.float32)[:2])
    accurate(
        swiglu_quantize(gate_up, torch.float32, count).dense()[:2],
        swiglu_quantize(gate_up, torch.float32).dense()[:2],
        0,
    )


@DTYPES
@pytest.mark.parametrize(
    ("num_tokens", "num_q_heads", "num_kv_heads", "head_dim"),
    [(1, 1, 1, 2), (3, 4, 2, 6), (4, 4, 1, 128), (3, 2, 0, 64)],
)
def test_norm_rotation_and_kv_write_equal_their_reference(
    num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    angles = normal(1, num_tokens, head_dim // 2).repeat(1, 2)
    signed_sin = angles.sin()
    signed_sin[..., : head_dim // 2] *= -1
    rotations = torch.stack([angles.cos(), signed_sin], dim=1).to(dtype)
    heads = normal(0, num_tokens, num_q_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    norms = normal(2, num_q_heads + num_kv_heads, head_dim, dtype=dtype)
    pool = normal(3, 2 * num_kv_heads, 20, 4, head_dim, dtype=dtype) if num_kv_heads else None
    cells = torch.randperm(80)[:num_tokens].to(DEVICE) if num_kv_heads else None
    want, want_pool = heads.float(), None if pool is None else pool.float()

    qk_norm_rope_store(heads, norms, EPS, rotations, pool, cells)

    plain.qk_norm_rope_store(want, norms.float(), EPS, rotations.float(), want_pool, cells)
    accurate(heads, want, rounding(dtype))
    if pool is not None and want_pool is not None:
        accurate(pool, want_pool, rounding(dtype))


def test_k_and_v_are_stored_as_fp8_where_the_pool_is() -> None:
    heads = normal(0, 3, 4, 64)
    heads[0, -1, 0] = 1000.0  # beyond what e4m3 can tell
    pool = torch.zeros(2, 5, 4, 64, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    cells = torch.tensor([7, 0, 19], device=DEVICE)
    rotations = torch.ones(3, 2, 64, device=DEVICE)
    qk_norm_rope_store(heads, normal(1, 3, 64), EPS, rotations, pool, cells)
    want = heads[:, 2:].transpose(0, 1).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(pool.view(torch.uint8).flatten(1, 2)[:, cells], want.view(torch.uint8))


@pytest.mark.parametrize("is_normalized", [True, False], ids=["of the chosen", "of all"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 1, 1), (4, 5, 2), (3, 128, 8)])
def test_expert_choice_equals_its_reference(is_normalized: bool, num_tokens: int, num_experts: int, top_k: int) -> None:
    logits = normal(0, num_tokens, num_experts)
    ids, weights = choose_experts(logits, top_k, is_normalized=is_normalized)
    want_ids, want_weights = plain.choose_experts(logits, top_k, is_normalized=is_normalized)
    assert torch.equal(ids, want_ids)
    accurate(weights, want_weights, 1e-5)


@pytest.mark.parametrize("slots", [[[4], [0], [2], [1], [3]], [[4, 4, 4], [0, 5, 0], [2, 2, 2], [1, 6, 7], [3, 3, 3]]])
def test_slots_of_chosen_experts_equal_their_reference(slots: list[list[int]]) -> None:
    slots_ER = torch.tensor(slots, device=DEVICE)
    counts_E = torch.tensor([len(set(replicas)) for replicas in slots], device=DEVICE)
    logits = normal(0, 7, 5)
    got, weights = choose_slots(logits, 3, slots_ER, counts_E, is_normalized=True)
    ids, want_weights = choose_experts(logits, 3, is_normalized=True)
    assert torch.equal(got, slots_of_chosen(ids, Replicas(slots_ER, counts_E)))
    assert torch.equal(weights, want_weights)


def test_of_equal_experts_the_first_are_chosen() -> None:
    ids, _ = choose_experts(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]], device=DEVICE), 4, is_normalized=True)
    assert ids.tolist() == [[1, 2, 4, 0]]


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, on whom the interpreter stands
def test_logits_that_are_no_numbers_choose_experts_that_exist() -> None:
    ids, _ = choose_experts(torch.full((1, 5), torch.nan, device=DEVICE), 2, is_normalized=True)
    assert all(0 <= expert < 5 for expert in ids[0].tolist())
