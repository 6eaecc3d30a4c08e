"""DeepGEMM's product of FP8 rows and a weight in tiles, for prompts, where deep_gemm is installed.

Its interface as of 2026: `fp8_gemm_nt((a, sfa), (b, sfb), d)` writes d = a @ b.T in bf16. On Hopper the scales of a are
fp32 with rows side by side and room for a multiple of four, as `QuantizedRows` has them, and those of b one per tile of
128 x 128. It compiles a kernel when a shape first comes. R rows, O outputs, I inputs.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from workers.kernels.invariance import is_invariant
from workers.kernels.optional import installed
from workers.kernels.tiles import TILE, TileWeight
from workers.kernels.triton.rows import QuantizedRows

MIN_ROWS = 256
"""Fewer are bound by the weight's bytes, and our splits read those with every processor."""
OUTPUT_MULTIPLE = 64


def fits(num_rows: int, weight_shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether it is for this product."""
    num_outputs, size_in = weight_shape
    is_aligned = num_outputs % OUTPUT_MULTIPLE == 0 and size_in % TILE == 0
    return num_rows >= MIN_ROWS and is_aligned and dtype == torch.bfloat16


def library_for(x: QuantizedRows, weight: TileWeight) -> ModuleType | None:
    """The library where it is installed, fits, and no bit has to be that of a decode."""
    if is_invariant() or not fits(len(x.codes_RI), weight.shape, x.dtype):
        return None
    return installed("deep_gemm")


def linear(library: ModuleType, x: QuantizedRows, weight: TileWeight) -> Tensor:
    """x @ weight.T, [R, O]."""
    out_RO = torch.empty(len(x.codes_RI), weight.shape[0], dtype=x.dtype, device=x.codes_RI.device)
    library.fp8_gemm_nt((x.codes_RI, x.scale_Rk), (weight.codes_OI, weight.scale_ok), out_RO)
    return out_RO
