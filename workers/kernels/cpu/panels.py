"""Weights as the CPU kernels read them: stored values, not floats, in panels of 32 outputs.

An e4m3 code stays one byte and is widened in registers, which makes a decode step read a quarter of the memory; bf16
takes two. Shapes: O out, I in, P panels, L lanes (outputs) of one, e experts, t tiles along the inputs.

Products are fp32, or bf16 where the CPU multiplies two bf16 inputs of an output in the time of one: the stored values
are exact in it, and each row is rounded to it; sums are fp32 in both. Such panels have the two inputs side by side.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from workers.kernels.cpu import large_pages
from workers.kernels.cpu.library import native

PANEL = 32
PAIR = PANEL // 2
CODE_SHIFT = 256.0
"""The kernels read a code's bits as fp16, 2**8 too small; the scales make up for it."""
Products = Literal["fp32", "bf16"]
KINDS: dict[tuple[torch.dtype, Products], int] = {
    (torch.uint8, "fp32"): 0,
    (torch.bfloat16, "fp32"): 1,
    (torch.float32, "fp32"): 2,
    (torch.uint8, "bf16"): 3,
    (torch.bfloat16, "bf16"): 4,
}
"""`Kind` of native/weight.h."""


class _Weight(ctypes.Structure):
    """`mull::Weight` of native/weight.h."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("out", ctypes.c_int64),
        ("in", ctypes.c_int64),
        ("num_panels", ctypes.c_int64),
        ("num_tiles", ctypes.c_int64),
        ("first_tile", ctypes.c_int64),
        ("tile", ctypes.c_int64),
        ("num_experts", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("is_paired", ctypes.c_int32),
    )


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a slice's inputs lie in tiles: the first may be cut, and so may the last."""

    first: int
    size: int

    def count(self, num_inputs: int) -> int:
        return 1 + max(0, -(-(num_inputs - self.first) // self.size))


@dataclass(frozen=True, kw_only=True, eq=False)
class PanelWeight:
    """A matrix [O, I], or a stack [e, O, I] of them; read by `linear`, `swiglu_linear` and `apply_experts` alone."""

    panels_ePIL: Tensor
    """uint8 (e4m3 codes), bf16 or fp32; zeros behind the last row."""
    scale_etX: Tensor | None
    """fp32, one per tile and lane; X is P L. None where values need no scale."""
    num_rows: int
    """O."""
    tiling: Tiling
    is_paired: bool
    """The rows are a gate above an up: 16 of the one and the same 16 of the other share a panel."""
    is_stacked: bool
    products: Products = "fp32"
    first_row: int = 0
    """Of the first panel: rows before it are computed and cut off."""

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        tiling: Tiling | None,
        *,
        is_paired: bool,
        products: Products = "fp32",
    ) -> PanelWeight:
        """Room for a weight [O, I] or [e, O, I]; without a tiling there are no scales.

        Products in bf16 are for stored values that are exact in it, and inputs of which two are always of one tile.
        """
        *stack, num_rows, num_inputs = shape
        num_experts, num_panels = math.prod(stack), num_panels_of(num_rows, is_paired)
        panels = large_pages.zeros((num_experts, num_panels, num_inputs, PANEL), dtype)
        scale = None
        if tiling is not None:
            scale = torch.zeros(num_experts, tiling.count(num_inputs), num_panels * PANEL)
        tiling = tiling or Tiling(first=num_inputs, size=num_inputs)
        is_odd = any(count % 2 for count in (num_inputs, tiling.first, tiling.size))
        return cls(
            panels_ePIL=panels,
            scale_etX=scale,
            num_rows=num_rows,
            tiling=tiling,
            is_paired=is_paired,
            is_stacked=bool(stack),
            products="fp32" if is_odd or dtype == torch.float32 else products,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        matrix = (self.num_rows, self.panels_ePIL.shape[2])
        return (self.panels_ePIL.shape[0], *matrix) if self.is_stacked else matrix

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def numel(self) -> int:
        return math.prod(self.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of, each stacked over experts in its first dimension."""
        return (self.panels_ePIL,) if self.scale_etX is None else (self.panels_ePIL, self.scale_etX)

    def rows(self, start: int, stop: int) -> PanelWeight:
        """Rows [start, stop) of a matrix, without a copy of its values."""
        first, last = start // PANEL, -(-stop // PANEL)
        scale = self.scale_etX
        return PanelWeight(
            panels_ePIL=self.panels_ePIL[:, first:last],
            scale_etX=None if scale is None else scale[:, :, first * PANEL : last * PANEL].contiguous(),
            num_rows=stop - start,
            tiling=self.tiling,
            is_paired=False,
            is_stacked=False,
            products=self.products,
            first_row=start - first * PANEL,
        )

    def store_rows(self, expert: int, first_row: int, values_RI: Tensor) -> None:
        """Put rows of the panels' dtype into place; other rows may be stored at the same time."""
        library = native()
        assert library is not None, "panels exist only where there are kernels to read them"
        panels_PIL, num_inputs = self.panels_ePIL[expert], values_RI.shape[1]
        assert values_RI.dtype == panels_PIL.dtype, f"{values_RI.dtype} values for panels of {panels_PIL.dtype}"
        pair_rows = self.num_rows // 2 if self.is_paired else 0
        source = values_RI.contiguous()
        library.mull_pack(
            *(source.data_ptr(), len(source), num_inputs, source.itemsize, first_row, pair_rows),
            *(self._kind, panels_PIL.data_ptr()),
        )

    def store_scales(self, expert: int, first_row: int, scale_Rt: Tensor) -> None:
        """Put the tiles' scales of each of these rows into place."""
        assert self.scale_etX is not None, "only e4m3 codes have scales"
        rows = range(first_row, first_row + len(scale_Rt))
        self.scale_etX[expert][:, lanes(rows, self.num_rows, self.is_paired)] = scale_Rt.float().t() * CODE_SHIFT

    def lookup(self, rows_T: Tensor) -> Tensor:
        """Rows of a matrix without scales, as fp32 [T, I]: an embedding that shares its table with the head."""
        panels_PIL = self.panels_ePIL[0]
        if self.products == "fp32":
            return panels_PIL[rows_T // PANEL, :, rows_T % PANEL].float()
        assert panels_PIL.dtype == torch.bfloat16, "codes have scales"
        pairs_PJL2 = panels_PIL.view(len(panels_PIL), -1, PANEL, 2)
        return pairs_PJL2[rows_T // PANEL, :, rows_T % PANEL].flatten(1).float()

    def dense(self) -> Tensor:
        """The fp32 weight that the panels stand for, row by row: for tests and for a look at it."""
        places = self.first_row + lanes(range(self.num_rows), self.num_rows, self.is_paired)
        values = self._in_order()
        values = (values.view(torch.float8_e4m3fn) if values.dtype == torch.uint8 else values).float()
        rows_eOI = values.transpose(2, 3).flatten(1, 2)[:, places]
        if self.scale_etX is not None:
            inputs = torch.arange(rows_eOI.shape[2])
            tile_I = (inputs - self.tiling.first).div(self.tiling.size, rounding_mode="floor") + 1
            rows_eOI = rows_eOI * (self.scale_etX / CODE_SHIFT).transpose(1, 2)[:, places][:, :, tile_I]
        return rows_eOI.reshape(self.shape)

    def _in_order(self) -> Tensor:
        """The panels [e, P, I, L] with each input's lanes one after another, as they lie for fp32 products."""
        panels = self.panels_ePIL
        if self.products == "fp32":
            return panels
        num_experts, num_panels, num_inputs, _ = panels.shape
        if panels.dtype == torch.uint8:  # mull_pack's order of bytes
            panels = panels.view(num_experts, num_panels, num_inputs // 2, 4, 2, 8).transpose(3, 4)
        steps = panels.reshape(num_experts, num_panels, num_inputs // 2, PANEL, 2)
        return steps.transpose(3, 4).reshape(num_experts, num_panels, num_inputs, PANEL)

    @property
    def _kind(self) -> int:
        return KINDS[self.panels_ePIL.dtype, self.products]

    @cached_property
    def address(self) -> int:
        """Of the C structure, which lives as long as this object."""
        return ctypes.addressof(self._structure)

    @cached_property
    def _structure(self) -> _Weight:
        num_experts, num_panels, num_inputs, _ = self.panels_ePIL.shape
        out = self.num_rows // 2 if self.is_paired else self.first_row + self.num_rows
        return _Weight(
            self.panels_ePIL.data_ptr(),
            None if self.scale_etX is None else self.scale_etX.data_ptr(),
            out,
            num_inputs,
            num_panels,
            0 if self.scale_etX is None else self.scale_etX.shape[1],
            self.tiling.first,
            self.tiling.size,
            num_experts,
            self._kind,
            int(self.is_paired),
        )


def num_panels_of(num_rows: int, is_paired: bool) -> int:
    return -(-num_rows // 2 // PAIR) if is_paired else -(-num_rows // PANEL)


def dense(weight: Tensor | PanelWeight) -> Tensor:
    """A weight row by row, however it lies in memory."""
    return weight.dense() if isinstance(weight, PanelWeight) else weight.float()


def lanes(rows: range, num_rows: int, is_paired: bool) -> Tensor:
    """Where rows of a weight lie: PANEL * panel + lane."""
    row = torch.arange(rows.start, rows.stop)
    if not is_paired:
        return row
    half = num_rows // 2
    within, is_up = row % half, row // half
    return within // PAIR * PANEL + within % PAIR + is_up * PAIR
