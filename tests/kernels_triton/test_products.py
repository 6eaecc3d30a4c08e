"""Products with block-FP8 weights, and experts: routes, grouped products, their sum."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install triton")

from tests.kernels_triton.values import DEVICE, accurate, normal, tile_weight
from workers.kernels.tiles import TileWeight
from workers.kernels.triton import experts, gemm, ordered_sum, reference
from workers.kernels.triton.quantize import quantize
from workers.kernels.triton.route import route


@pytest.mark.parametrize(
    ("num_rows", "size_in", "size_out"), [(1, 128, 64), (3, 1024, 100), (17, 384, 130), (70, 256, 200)]
)
def test_a_product_with_tiles_equals_its_reference(num_rows: int, size_in: int, size_out: int) -> None:
    x, weight = quantize(normal(0, num_rows, size_in)), tile_weight(1, size_out, size_in)
    accurate(gemm.linear(x, weight), reference.linear(x, weight))


def test_every_code_of_a_weight_is_read_as_torch_reads_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes).to(torch.uint8)
    weight = TileWeight(
        torch.zeros(256, 128, dtype=torch.uint8, device=DEVICE)
        .index_copy_(1, torch.tensor([0], device=DEVICE), codes[:, None])
        .view(torch.float8_e4m3fn),
        torch.ones(2, 1, device=DEVICE),
        256,
    )
    x = torch.zeros(1, 128, device=DEVICE)
    x[0, 0] = 448
    got = gemm.linear(quantize(x), weight)
    assert torch.equal(got[0], 448 * codes.view(torch.float8_e4m3fn).float())


def test_a_row_has_the_same_bits_whatever_stands_beside_it() -> None:
    x, weight = normal(0, 70, 1024), tile_weight(1, 130, 1024)
    together = gemm.linear(quantize(x), weight)
    for rows in (slice(0, 1), slice(10, 27)):
        assert torch.equal(gemm.linear(quantize(x[rows]), weight), together[rows])


def test_rows_of_a_weight_give_the_bits_of_the_whole_weight() -> None:
    x, weight = quantize(normal(0, 1, 1024)), tile_weight(1, 256, 1024)
    part = gemm.linear(x, weight.rows(128, 256))
    assert torch.equal(part, gemm.linear(x, weight)[:, 128:])


def test_splits_follow_from_the_weight_and_are_stored_where_rows_are_few() -> None:
    splits = gemm.num_splits(2560, 4096)
    assert splits > 1
    assert gemm.blocks_of(1, splits).splits == 1
    assert gemm.blocks_of(1000, splits).splits == splits


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "first", "num_local"), [(1, 1, 0, 1), (7, 2, 2, 3), (600, 4, 0, 8), (2050, 4, 6, 2)]
)
def test_routes_sort_local_pairs_by_expert(num_tokens: int, top_k: int, first: int, num_local: int) -> None:
    slots = torch.randint(0, 8, (num_tokens, top_k), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    loads = torch.full((num_local,), 5, dtype=torch.int64, device=DEVICE)
    routes = route(slots, first, num_local, loads)
    flat = slots.flatten().tolist()
    want = [[pair for pair, slot in enumerate(flat) if slot == first + local] for local in range(num_local)]
    pairs = [pair for pairs_of_one in want for pair in pairs_of_one]
    assert routes.counts_e.tolist() == [len(pairs_of_one) for pairs_of_one in want]
    assert loads.tolist() == [5 + len(pairs_of_one) for pairs_of_one in want], "counted beside what was there"
    assert routes.pair_P[: len(pairs)].tolist() == pairs
    assert routes.place_P[pairs].tolist() == list(range(len(pairs)))


@pytest.mark.parametrize(
    ("num_tokens", "hidden", "first", "num_local"),
    [(1, 1024, 0, 5), (2, 1024, 2, 3), (12, 128, 2, 3)],
)
def test_experts_in_tiles_equal_their_reference(num_tokens: int, hidden: int, first: int, num_local: int) -> None:
    ffn, top_k = 128, 2
    slots = torch.rand(num_tokens, 5, generator=torch.Generator().manual_seed(0)).topk(top_k).indices.to(DEVICE)
    x, weights = normal(1, num_tokens, hidden), normal(2, num_tokens, top_k).abs()
    gate_up, down = tile_weight(3, num_local, 2 * ffn, hidden), tile_weight(4, num_local, hidden, ffn)
    got = experts.apply_experts(x, slots, weights, gate_up, down, first)
    want = reference.apply_experts(x, slots, weights, gate_up, down, first)
    # The activation's last bit moves some codes: a code's step is a sixteenth of its value.
    accurate(got, want, 2e-3)


def test_a_token_has_the_same_bits_from_the_experts_of_a_decode_and_of_a_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slots = torch.tensor([[0, 1], [1, 2], [3, 0], [1, 3]], device=DEVICE)
    x, weights = normal(1, 4, 1024), normal(2, 4, 2).abs()
    gate_up, down = tile_weight(3, 2, 256, 1024), tile_weight(4, 2, 1024, 128)
    in_decode = experts.apply_experts(x[2:], slots[2:], weights[2:], gate_up, down, 0)
    monkeypatch.setattr(experts, "PREFILL_PAIRS_PER_EXPERT", 1)
    assert experts.blocks_of(8, 2, 2).splits == 2
    in_prefill = experts.apply_experts(x, slots, weights, gate_up, down, 0)
    assert torch.equal(in_decode, in_prefill[2:])
    accurate(in_prefill, reference.apply_experts(x, slots, weights, gate_up, down, 0), 2e-3)


@pytest.mark.parametrize("num_tokens", [1, 12])
def test_experts_in_floats_equal_their_reference(num_tokens: int) -> None:
    slots = torch.rand(num_tokens, 5, generator=torch.Generator().manual_seed(0)).topk(2).indices.to(DEVICE)
    x, weights = normal(1, num_tokens, 72), normal(2, num_tokens, 2).abs()
    gate_up, down = normal(3, 3, 20, 72), normal(4, 3, 72, 10)
    got = experts.apply_experts(x, slots, weights, gate_up, down, 1)
    accurate(got, reference.apply_experts(x, slots, weights, gate_up, down, 1), 1e-5)


def test_tokens_without_local_experts_add_nothing() -> None:
    slots = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    gate_up, down = tile_weight(0, 2, 256, 128), tile_weight(1, 2, 128, 128)
    got = experts.apply_experts(normal(2, 3, 128), slots, torch.ones(3, 1, device=DEVICE), gate_up, down, 7)
    assert torch.equal(got, torch.zeros(3, 128, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_sum_of_ranks_parts_has_the_bits_of_adding_one_after_another(dtype: torch.dtype) -> None:
    # Of magnitudes so different that every order of adding gives another sum.
    parts = torch.stack([normal(rank, 1100, dtype=torch.float32) * 8.0**rank for rank in range(8)]).to(dtype)
    want = torch.empty_like(parts[0])
    got = ordered_sum.sum_in_order(parts.flip(0).contiguous(), want)
    total = parts[7].clone()
    for part in reversed(parts[:7].unbind()):
        total += part
    assert got is want
    assert torch.equal(got, total)
