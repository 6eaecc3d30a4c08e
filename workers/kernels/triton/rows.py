"""Activations as the FP8 kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128
"""Columns of a row that share a scale."""
SCALE_ROWS = 4
"""torch's own FP8 product wants so many rows or a multiple: scales have room for them."""


@dataclass(frozen=True)
class QuantizedRows:
    """e4m3 codes, and an fp32 scale per row and TILE columns. Scales of one tile lie side by side: strides (1, R)."""

    codes_RI: Tensor
    scale_Rk: Tensor
    dtype: torch.dtype
    """Of what was quantised, and so of products with it."""

    @classmethod
    def empty(cls, num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> QuantizedRows:
        codes_RI = torch.empty(num_rows, size, dtype=torch.float8_e4m3fn, device=device)
        padded = -(-num_rows // SCALE_ROWS) * SCALE_ROWS
        scale_kR = torch.empty(size // TILE, padded, dtype=torch.float32, device=device)
        return cls(codes_RI, scale_kR.t()[:num_rows], dtype)

    def dense(self) -> Tensor:
        """What the codes stand for, in fp32: for tests."""
        return self.codes_RI.float() * self.scale_Rk.repeat_interleave(TILE, 1)
