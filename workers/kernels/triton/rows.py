"""Activations as the FP8 kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128
"""Columns of a row that share a scale."""
SCALE_ROWS = 4
"""torch's own FP8 product wants so many rows or a multiple: codes and scales have room for them."""


@dataclass(frozen=True)
class QuantizedRows:
    """e4m3 codes, and an fp32 scale per row and TILE columns. Scales of one tile lie side by side: strides (1, R)."""

    codes_RI: Tensor
    scale_Rk: Tensor
    dtype: torch.dtype
    """Of what was quantised, and so of products with it."""

    @classmethod
    def empty(cls, num_rows: int, size: int, dtype: torch.dtype, device: torch.device) -> QuantizedRows:
        padded = -(-num_rows // SCALE_ROWS) * SCALE_ROWS
        codes_RI = torch.empty(padded, size, dtype=torch.float8_e4m3fn, device=device)
        scale_kR = torch.empty(size // TILE, padded, dtype=torch.float32, device=device)
        return cls(codes_RI[:num_rows], scale_kR.t()[:num_rows], dtype)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Codes and scales with the rows that `empty` has made room for; what these hold is undefined."""
        (num_rows, size), num_padded = self.codes_RI.shape, self.scale_Rk.stride(1)
        assert num_rows <= num_padded, "made by `empty`"
        tiles = self.scale_Rk.shape[1]
        scale_Rk = self.scale_Rk.as_strided((num_padded, tiles), (1, num_padded))
        return self.codes_RI.as_strided((num_padded, size), (size, 1)), scale_Rk

    def dense(self) -> Tensor:
        """What the codes stand for, in fp32: for tests."""
        return self.codes_RI.float() * self.scale_Rk.repeat_interleave(TILE, 1)
