"""Block-FP8 weights as GPU kernels read them: the checkpoint's own codes, row by row, and a scale per tile.

O out, I in, e experts, o and k tiles along outputs and inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128
"""Rows and columns that share a scale; the kernels know no other size."""


@dataclass(frozen=True, eq=False)
class TileWeight:
    """A matrix [O, I], or a stack [e, O, I] of them, whose rows start at a tile."""

    codes_OI: Tensor
    """float8_e4m3fn, contiguous; I is a multiple of TILE."""
    scale_ok: Tensor
    """fp32, contiguous."""
    whole_rows: int
    """Of the parameter that this is a part of: how a product is split follows from them, and so do its bits."""

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device | None) -> TileWeight:
        """Room for a weight [O, I] or [e, O, I]; zeros, as experts' slots may stay empty."""
        *stack, size_out, size_in = shape
        codes_OI = torch.zeros(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        scale_ok = torch.zeros(*stack, -(-size_out // TILE), size_in // TILE, dtype=torch.float32, device=device)
        return cls(codes_OI, scale_ok, size_out)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes_OI.shape)

    @property
    def nbytes(self) -> int:
        return self.codes_OI.nbytes + self.scale_ok.nbytes

    def numel(self) -> int:
        return math.prod(self.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of, each stacked over experts in its first dimension."""
        return self.codes_OI.view(torch.uint8), self.scale_ok

    def rows(self, start: int, stop: int) -> TileWeight:
        """Rows [start, stop) of a matrix, sharing its values; `start` is at a tile."""
        assert start % TILE == 0, f"row {start} is inside a tile"
        return TileWeight(self.codes_OI[start:stop], self.scale_ok[start // TILE : -(-stop // TILE)], self.whole_rows)

    def store_rows(self, expert: int | None, first_row: int, codes_RI: Tensor, scale_rk: Tensor) -> None:
        """Put rows of codes (uint8) and the scales of their tiles into place; `first_row` is at a tile."""
        codes_OI, scale_ok = self.codes_OI.view(torch.uint8), self.scale_ok
        if expert is not None:
            codes_OI, scale_ok = codes_OI[expert], scale_ok[expert]
        # Without a wait: what is pinned travels while the next rows are read.
        codes_OI[first_row : first_row + len(codes_RI)].copy_(codes_RI, non_blocking=True)
        first = first_row // TILE
        scale_ok[first : first + len(scale_rk)].copy_(scale_rk, non_blocking=True)

    def dense(self) -> Tensor:
        """The fp32 weight that the codes stand for: for tests."""
        size_out = self.shape[-2]
        scale = self.scale_ok.repeat_interleave(TILE, -2)[..., :size_out, :].repeat_interleave(TILE, -1)
        return self.codes_OI.float() * scale
