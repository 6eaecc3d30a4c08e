"""Rows put where a grouped product of others' wants them: each expert's together, from a row of its own choosing on.

Our own grouped product needs no such copy: it looks its rows up. P pairs of a token and one of its chosen experts, R
rows of all experts, I columns, k tiles of 128 columns, e local experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.numerics import TILE
from workers.kernels.triton.route import Routes
from workers.kernels.triton.rows import QuantizedRows


@dataclass(frozen=True)
class Layout:
    """Where experts' rows lie."""

    first_row_e: Tensor
    """Of each expert, int32."""
    num_rows: int
    """For all experts, with what is left between them."""
    group_rows: int
    """Rows whose scales lie together: for each tile of columns those of so many rows, then the next rows'."""


@dataclass(frozen=True)
class Spread:
    """Copies of rows. What lies between experts is undefined."""

    rows: QuantizedRows
    place_P: Tensor
    """The row of each pair that is local, int32."""


def spread(x: QuantizedRows, slots_TK: Tensor, first_slot: int, routes: Routes, layout: Layout) -> Spread:
    """Each local pair's row of `x`, which has one for each token, in its expert's place."""
    num_tokens, top_k = slots_TK.shape
    size = x.codes_RI.shape[1]
    out = QuantizedRows.empty(layout.num_rows, size, x.dtype, x.codes_RI.device)
    place_P = torch.empty_like(routes.place_P)
    if num_tokens:
        num_tiles = size // TILE.value
        _spread[(num_tokens * top_k,)](
            *(x.codes_RI.view(torch.uint8), x.scale_Rk, x.scale_Rk.stride(1), slots_TK.contiguous()),
            *(routes.starts_e, routes.place_P, layout.first_row_e, out.codes_RI.view(torch.uint8), out.scale_Rk),
            *(place_P, layout.group_rows, first_slot, len(layout.first_row_e), size, num_tiles, top_k),
            *(triton.next_power_of_2(size), triton.next_power_of_2(num_tiles)),
        )
    return Spread(out, place_P)


@triton.jit(do_not_specialize=["x_scale_stride", "group_rows"])
def _spread(
    x_ptr,
    x_scale_ptr,
    x_scale_stride,
    slots_ptr,
    starts_ptr,
    place_ptr,
    first_row_ptr,
    out_ptr,
    out_scale_ptr,
    out_place_ptr,
    group_rows,
    first_slot,
    num_local,
    size,
    num_tiles,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    pair = tl.program_id(0)
    local = tl.load(slots_ptr + pair) - first_slot
    if (local >= 0) & (local < num_local):
        rank = tl.load(place_ptr + pair) - tl.load(starts_ptr + local)
        row = tl.load(first_row_ptr + local) + rank
        tl.store(out_place_ptr + pair, row)
        token, row = (pair // TOP_K).to(tl.int64), row.to(tl.int64)
        column_I, tile_k = tl.arange(0, BLOCK), tl.arange(0, TILES)
        codes_I = tl.load(x_ptr + token * size + column_I, mask=column_I < size)
        tl.store(out_ptr + row * size + column_I, codes_I, mask=column_I < size)
        scale_k = tl.load(x_scale_ptr + token + tile_k * x_scale_stride, mask=tile_k < num_tiles)
        group_ptr = out_scale_ptr + row // group_rows * num_tiles * group_rows + row % group_rows
        tl.store(group_ptr + tile_k * group_rows, scale_k, mask=tile_k < num_tiles)
