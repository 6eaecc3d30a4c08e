"""Rows in the order of the experts that compute them, found on the device: a count, a start and a place for each.

P pairs of a token and one of its chosen experts, pair p of token p // K; e local experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALL_BLOCK, BLOCK, LARGE_BLOCK = 64, 1024, 8192
"""Pairs at a time: of a few sizes, as each is a kernel to be compiled. Every program looks through all pairs, twice: of
a prompt's 65,536, a thousand at a time would be 128 waits for memory, one behind the other."""


@dataclass(frozen=True)
class Routes:
    """Local pairs sorted by expert, and within one by their number. Places behind the last are undefined."""

    starts_e: Tensor
    """Place of each expert's first pair; one more tells how many there are, [e + 1], int32."""
    pair_P: Tensor
    """The pair in each place, int32."""
    place_P: Tensor
    """The place of each pair that is local, int32."""

    @property
    def counts_e(self) -> Tensor:
        return self.starts_e.diff()


def route(slots_TK: Tensor, first_slot: int, num_local: int, loads_e: Tensor | None = None) -> Routes:
    """Sort pairs by slot, those of slots [first_slot, first_slot + num_local), and add their numbers to `loads_e`."""
    num_pairs, device = slots_TK.numel(), slots_TK.device
    starts_e = torch.empty(num_local + 1, dtype=torch.int32, device=device)
    pair_P = torch.empty(num_pairs, dtype=torch.int32, device=device)
    place_P = torch.empty(num_pairs, dtype=torch.int32, device=device)
    block, warps = _block_of(num_pairs)
    _route[(num_local + 1,)](
        *(slots_TK.contiguous(), starts_e, pair_P, place_P, loads_e, num_pairs, first_slot, num_local, block),
        num_warps=warps,
    )
    return Routes(starts_e, pair_P, place_P)


def _block_of(num_pairs: int) -> tuple[int, int]:
    """Pairs at a time, and warps."""
    if num_pairs <= SMALL_BLOCK:
        return SMALL_BLOCK, 1
    return (BLOCK, 4) if num_pairs <= 4 * BLOCK else (LARGE_BLOCK, 16)


@triton.jit(do_not_specialize=["num_pairs"])
def _route(
    slots_ptr, starts_ptr, pair_ptr, place_ptr, loads_ptr, num_pairs, first_slot, num_local, BLOCK: tl.constexpr
):
    """A program for each expert: counts the pairs of those before it, then puts its own into place, in order."""
    expert = tl.program_id(0)
    earlier_B = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        pair_B = start + tl.arange(0, BLOCK)
        local_B = tl.load(slots_ptr + pair_B, mask=pair_B < num_pairs, other=first_slot - 1) - first_slot
        earlier_B += ((local_B >= 0) & (local_B < expert)).to(tl.int32)
    place = tl.sum(earlier_B, axis=0)
    first_place = place
    tl.store(starts_ptr + expert, place)
    if expert < num_local:
        for start in range(0, num_pairs, BLOCK):
            pair_B = start + tl.arange(0, BLOCK)
            local_B = tl.load(slots_ptr + pair_B, mask=pair_B < num_pairs, other=first_slot - 1) - first_slot
            is_own_B = local_B == expert
            count_B = is_own_B.to(tl.int32)
            place_B = place + tl.cumsum(count_B, axis=0) - count_B
            tl.store(pair_ptr + place_B, pair_B, mask=is_own_B)
            tl.store(place_ptr + pair_B, place_B, mask=is_own_B)
            place += tl.sum(count_B, axis=0)
        if loads_ptr is not None:
            tl.store(loads_ptr + expert, tl.load(loads_ptr + expert) + (place - first_place))
