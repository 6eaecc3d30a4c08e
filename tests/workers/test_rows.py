"""Rows of bytes on their way to the experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.experts.rows import ExactRows, Fp8Rows, RoutedRows, RowPacker


def rows(count: int, hidden_size: int, dtype: torch.dtype, seed: int = 0) -> RoutedRows:
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-4, 4, (count, 1), generator=generator)
    x_RH = (torch.randn(count, hidden_size, generator=generator) * sizes).to(dtype)
    slots_RK = torch.randint(0, 4096, (count, 3), generator=generator)
    return RoutedRows(x_RH, slots_RK, torch.rand(count, 3, generator=generator).to(dtype))


@given(
    count=st.integers(0, 5),
    hidden_size=st.integers(1, 70).map(lambda n: 4 * n),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_exact_rows_arrive_bit_for_bit(count: int, hidden_size: int, dtype: torch.dtype) -> None:
    sent, packer = rows(count, hidden_size, dtype), RowPacker(ExactRows(hidden_size, dtype), 3)
    packed = packer.pack(sent)
    got = packer.unpack(packed)
    assert packed.shape == (count, packer.row_bytes)
    assert torch.equal(got.x_RH, sent.x_RH)
    assert torch.equal(got.slots_RK, sent.slots_RK)
    assert torch.equal(got.weights_RK, sent.weights_RK)


@given(count=st.integers(0, 5), hidden_size=st.integers(1, 300), seed=st.integers(0, 99))
def test_fp8_rows_are_off_by_a_sixteenth_at_most(count: int, hidden_size: int, seed: int) -> None:
    sent, packer = rows(count, hidden_size, torch.float32, seed), RowPacker(Fp8Rows(hidden_size, torch.float32), 3)
    got = packer.unpack(packer.pack(sent))
    largest = sent.x_RH.abs().amax(dim=1, keepdim=True) if count else sent.x_RH
    assert ((got.x_RH - sent.x_RH).abs() <= sent.x_RH.abs() / 16 + largest / 2**17).all()
    assert torch.equal(got.slots_RK, sent.slots_RK)
    assert torch.equal(got.weights_RK, sent.weights_RK)


@pytest.mark.parametrize(
    ("packer", "row_bytes"),
    [
        (RowPacker(ExactRows(4096, torch.bfloat16), 8), 8256),
        (RowPacker(Fp8Rows(4096, torch.bfloat16), 8), 4096 + 128 + 64),
    ],
)
def test_a_row_of_the_235b_has_the_bytes_that_the_choice_counts_with(packer: RowPacker, row_bytes: int) -> None:
    assert packer.row_bytes == row_bytes


def test_a_row_of_zeros_survives_fp8() -> None:
    packer = RowPacker(Fp8Rows(128, torch.float32), 1)
    zeros = RoutedRows(torch.zeros(2, 128), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1))
    assert torch.equal(packer.unpack(packer.pack(zeros)).x_RH, zeros.x_RH)
