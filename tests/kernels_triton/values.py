"""Random inputs of the GPU kernels' tests, where these run."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from workers.kernels.tiles import TILE, TileWeight
from workers.kernels.triton.rows import QuantizedRows

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
"""The interpreter's, or the GPU of a machine that has one."""

TENSOR_CORE_ERROR = 2e-3
"""A Hopper tensor core keeps about 14 bits of a sum of FP8 products."""


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tile_weight(seed: int, *shape: int) -> TileWeight:
    """Every code but NaN may occur, and no two tiles have the same scale."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes = torch.where(codes & 0x7F == 0x7F, torch.tensor(0x7E, dtype=torch.uint8), codes)
    scale = torch.rand(*shape[:-2], -(-shape[-2] // TILE), shape[-1] // TILE, generator=generator) * 1e-3 + 1e-4
    return TileWeight(codes.to(DEVICE).view(torch.float8_e4m3fn), scale.to(DEVICE), shape[-2])


def accurate(got: Tensor, want: Tensor, tolerance: float = 3e-6) -> None:
    """To fp32 rounding, measured by the largest result: e4m3 spans six orders of magnitude."""
    if DEVICE.type == "cuda":
        tolerance = max(tolerance, TENSOR_CORE_ERROR)
    assert got.shape == want.shape
    assert (got.float() - want.float()).abs().max() <= tolerance * want.float().abs().max()


def same_rows(got: QuantizedRows, want: QuantizedRows) -> None:
    """Codes are equal but for a value that another rounding of its row's statistics moved to a neighbouring code."""
    torch.testing.assert_close(got.scale_Rk, want.scale_Rk, rtol=1e-5, atol=0)
    differ = got.codes_RI.view(torch.uint8) != want.codes_RI.view(torch.uint8)
    assert differ.float().mean() < 1e-2
    torch.testing.assert_close(got.dense(), want.dense(), rtol=0.13, atol=1e-6)
