"""DeepGEMM's grouped products of FP8 rows and experts in tiles, where deep_gemm is installed.

Its interface as of April 2026. `m_grouped_fp8_gemm_nt_contiguous((a, sfa), (b, sfb), d, ends, use_psum_layout=True)`
for prompts: rows of all experts one behind the other, each expert's from a multiple of 128 on, `ends` behind each one's
last row; what lies behind them is never visited, so that room for every pair costs memory alone. And
`m_grouped_fp8_gemm_nt_masked((a, sfa), (b, sfb), d, counts, expected_m)` for decodes: as many rows for each expert as
there are tokens. Shapes are known to the host and counts to the device, so both can be recorded. Both write bf16, and
what they write between experts is undefined. Scales as in `workers.kernels.deep_gemm`, those of masked rows group by
group. T tokens, K chosen experts, R rows of all experts, e local experts, M rows of one, H hidden, X gate and up.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from workers.kernels.deep_gemm import OUTPUT_MULTIPLE
from workers.kernels.invariance import is_invariant
from workers.kernels.optional import installed
from workers.kernels.tiles import TILE, TileWeight
from workers.kernels.triton.combine import combine
from workers.kernels.triton.quantize import quantize
from workers.kernels.triton.route import Routes, route
from workers.kernels.triton.rows import QuantizedRows
from workers.kernels.triton.spread import Layout, spread
from workers.kernels.triton.swiglu import swiglu_quantize

ALIGNMENT = 128
"""Of an expert's first row, on Hopper; and of the rows of one, so that no block of the library reaches the next."""
MIN_TOKENS = 64
"""Published figures of the masked product begin there; ours wastes less on blocks that hold a row or two."""
CONTIGUOUS_FROM_PAIRS = 32
"""For each local expert: from there on room for every token at every expert would be too much."""
NEWER_ARGUMENT = "use_psum_layout"
"""Older versions visit all the room that there is."""


def fits(num_tokens: int, dtype: torch.dtype, gate_up_eXH: Tensor | TileWeight, down_eHF: Tensor | TileWeight) -> bool:
    """Whether it is for these products."""
    if not (isinstance(gate_up_eXH, TileWeight) and isinstance(down_eHF, TileWeight)):
        return False
    shapes = gate_up_eXH.shape, down_eHF.shape
    is_aligned = all(outputs % OUTPUT_MULTIPLE == 0 and size_in % TILE == 0 for _, outputs, size_in in shapes)
    return num_tokens >= MIN_TOKENS and is_aligned and dtype == torch.bfloat16


def library_for(x_TH: Tensor, gate_up_eXH: Tensor | TileWeight, down_eHF: Tensor | TileWeight) -> ModuleType | None:
    """The library where it is installed, new enough, fits, and no bit has to be that of a decode."""
    if is_invariant() or not fits(len(x_TH), x_TH.dtype, gate_up_eXH, down_eHF):
        return None
    library = installed("deep_gemm")
    product = getattr(library, "m_grouped_fp8_gemm_nt_contiguous", None)
    return library if NEWER_ARGUMENT in (getattr(product, "__doc__", None) or "") else None


def apply_experts(
    library: ModuleType,
    x_TH: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    gate_up_eXH: TileWeight,
    down_eHF: TileWeight,
    first_slot: int,
    loads_e: Tensor | None,
    quantized: QuantizedRows | None = None,
) -> Tensor:
    """As `workers.kernels.triton.experts.apply_experts`."""
    num_local = gate_up_eXH.shape[0]
    routes = route(slots_TK, first_slot, num_local, loads_e)
    is_long = slots_TK.numel() > CONTIGUOUS_FROM_PAIRS * num_local
    product = (Contiguous if is_long else Masked)(library, routes, *slots_TK.shape)
    rows = spread(quantize(x_TH) if quantized is None else quantized, slots_TK, first_slot, routes, product.layout)
    gate_up_RX = product(rows.rows, gate_up_eXH)
    hidden = swiglu_quantize(gate_up_RX.unsqueeze(0), x_TH.dtype, product.counts, product.layout.group_rows)
    y_RH = product(hidden, down_eHF)
    return combine(y_RH.unsqueeze(0), slots_TK, weights_TK, rows.place_P, first_slot, num_local, x_TH.dtype)


class Contiguous:
    """Rows of experts one behind the other."""

    def __init__(self, library: ModuleType, routes: Routes, num_tokens: int, top_k: int) -> None:
        counts_e = routes.counts_e
        room_e = (counts_e + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
        first_row_e = room_e.cumsum(0, dtype=torch.int32) - room_e
        num_local, num_pairs = len(counts_e), num_tokens * top_k
        num_rows = (num_pairs // ALIGNMENT + min(num_local, num_pairs)) * ALIGNMENT
        self.layout = Layout(first_row_e, num_rows, num_rows)
        self._library, self._ends_e = library, first_row_e + counts_e
        self.counts = self._ends_e[-1:]
        """Rows behind them are nobody's."""
        self._expected = _power_of_2(num_pairs // num_local)

    def __call__(self, rows: QuantizedRows, weight_eOI: TileWeight) -> Tensor:
        """[R, O]"""
        out_RO = torch.empty(len(rows.codes_RI), weight_eOI.shape[1], dtype=rows.dtype, device=rows.codes_RI.device)
        self._library.m_grouped_fp8_gemm_nt_contiguous(
            (rows.codes_RI, rows.scale_Rk),
            (weight_eOI.codes_OI, weight_eOI.scale_ok),
            out_RO,
            self._ends_e,
            use_psum_layout=True,
            expected_m_for_psum_layout=self._expected,
        )
        return out_RO


class Masked:
    """Room for every token at every expert."""

    def __init__(self, library: ModuleType, routes: Routes, num_tokens: int, top_k: int) -> None:
        self.counts = routes.counts_e
        self._num_local = len(self.counts)
        self._room = -(-num_tokens // ALIGNMENT) * ALIGNMENT
        num_rows = self._num_local * self._room
        first_row_e = torch.arange(0, num_rows, self._room, dtype=torch.int32, device=self.counts.device)
        self.layout = Layout(first_row_e, num_rows, self._room)
        self._library = library
        self._expected = min(num_tokens, _power_of_2(num_tokens * top_k // self._num_local))

    def __call__(self, rows: QuantizedRows, weight_eOI: TileWeight) -> Tensor:
        """[R, O]"""
        size_out, size_in = weight_eOI.shape[1:]
        groups = self._num_local, self._room
        out_eMO = torch.empty(*groups, size_out, dtype=rows.dtype, device=rows.codes_RI.device)
        scale_ekM = rows.scale_Rk.t().reshape(self._num_local, size_in // TILE, self._room)
        self._library.m_grouped_fp8_gemm_nt_masked(
            (rows.codes_RI.view(*groups, size_in), scale_ekM.mT),
            (weight_eOI.codes_OI, weight_eOI.scale_ok),
            out_eMO,
            self.counts,
            self._expected,
        )
        return out_eMO.flatten(0, 1)


def _power_of_2(rows: int) -> int:
    """At least so many, of which the library has one kernel each: it compiles one for what it has not seen."""
    return 1 << max(0, rows - 1).bit_length()
