"""A token of each row's candidates in one launch: some forty in torch, of a few hundred numbers each.

What `workers.drawing` does, in fp64 as there: the cuts, then the argmax with noise mixed from (seed, position, token).
B rows, C candidates (likeliest first), F rules of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.noise import FIRST_FACTOR, INCREMENT, SECOND_FACTOR, UNIFORM_STEP, signed

_INCREMENT: tl.constexpr = tl.constexpr(signed(INCREMENT))
_FIRST_FACTOR: tl.constexpr = tl.constexpr(signed(FIRST_FACTOR))
_SECOND_FACTOR: tl.constexpr = tl.constexpr(signed(SECOND_FACTOR))
_UNIFORM_STEP: tl.constexpr = tl.constexpr(UNIFORM_STEP)


def draw(token_ids_BC: Tensor, logits_BC: Tensor, rules_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Which candidate is drawn, [B, 1], and its token id, [B]; rules as `RowRules.as_ints` packs them."""
    (num_rows, width), device = token_ids_BC.shape, token_ids_BC.device
    chosen_B1 = torch.empty(num_rows, 1, dtype=torch.int64, device=device)
    drawn_B = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows:
        _draw[(num_rows,)](
            *(token_ids_BC, token_ids_BC.stride(0), logits_BC, logits_BC.stride(0), rules_BF, rules_BF.stride(0)),
            *(chosen_B1, drawn_B, width, triton.next_power_of_2(width)),
            num_warps=1,
        )
    return chosen_B1, drawn_B


@triton.jit
def _draw(
    ids_ptr,
    ids_stride,
    logits_ptr,
    logits_stride,
    rules_ptr,
    rules_stride,
    chosen_ptr,
    drawn_ptr,
    width,
    CANDIDATES: tl.constexpr,
):
    row, rank_C = tl.program_id(0).to(tl.int64), tl.arange(0, CANDIDATES)
    is_there_C = rank_C < width
    id_C = tl.load(ids_ptr + row * ids_stride + rank_C, mask=is_there_C, other=0)
    logit_C = tl.load(logits_ptr + row * logits_stride + rank_C, mask=is_there_C, other=0.0).to(tl.float64)
    rules_ptr += row * rules_stride
    top_k = tl.load(rules_ptr)
    temperature = tl.load(rules_ptr + 1).to(tl.float64, bitcast=True)
    top_p = tl.load(rules_ptr + 2).to(tl.float64, bitcast=True)
    min_p = tl.load(rules_ptr + 3).to(tl.float64, bitcast=True)
    key = tl.load(rules_ptr + 4)
    scaled_C = logit_C / temperature
    is_kept_C = is_there_C & (rank_C < top_k)
    largest = tl.max(tl.where(is_kept_C, scaled_C, -float("inf")), axis=0)
    weight_C = tl.where(is_kept_C, tl.exp(scaled_C - largest), 0.0)
    prob_C = weight_C / tl.sum(weight_C, axis=0)
    likeliest = tl.sum(tl.where(rank_C == 0, prob_C, 0.0), axis=0)
    is_kept_C = is_kept_C & (tl.cumsum(prob_C, axis=0) - prob_C < top_p) & (prob_C >= likeliest * min_p)
    is_kept_C = is_kept_C | (rank_C == 0)  # the likeliest always stays
    noisy_C = tl.where(is_kept_C, scaled_C + _gumbel(key, id_C), -float("inf"))
    chosen = tl.argmax(noisy_C, axis=0)
    tl.store(chosen_ptr + row, chosen.to(tl.int64))
    tl.store(drawn_ptr + row, tl.sum(tl.where(rank_C == chosen, id_C, 0), axis=0))


@triton.jit
def _gumbel(key, id_C):
    hashed_C = key + id_C * _INCREMENT
    hashed_C = (hashed_C ^ _shifted(hashed_C, 30)) * _FIRST_FACTOR
    hashed_C = (hashed_C ^ _shifted(hashed_C, 27)) * _SECOND_FACTOR
    hashed_C = hashed_C ^ _shifted(hashed_C, 31)
    uniform_C = (_shifted(hashed_C, 12).to(tl.float64) + 0.5) * _UNIFORM_STEP
    return -tl.log(-tl.log(uniform_C))


@triton.jit
def _shifted(x, BITS: tl.constexpr):
    """To the right, as if there were no sign."""
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)
