"""The likeliest tokens of each row without a full sort, and without a look at the device.

A logit and its token id make one key, larger for a larger logit and of equal ones for a lower id: keys differ, so their
order is the candidates'. Blocks of the vocabulary keep their best, blocks of those again, until one block is left.
B rows, C candidates, v local vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
KEPT = (1, 32, 256)
"""Of a block: of a few sizes, as each is a kernel to be compiled."""


def likeliest_keys(logits_Bv: Tensor, count: int, first_id: int = 0) -> Tensor:
    """Keys of each row's `count` likeliest, largest first: [B, count], int64, as `workers.candidates` packs them.

    Ids count from `first_id`.
    """
    kept = _kept(count)
    source_BX = _narrowed(logits_Bv, kept, first_id)
    keys_Bk = torch.empty(len(source_BX), kept, dtype=torch.int64, device=source_BX.device)
    _launch(source_BX, first_id, kept, keys_Bk, None)
    return keys_Bk[:, :count]


def likeliest(source_BX: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Token ids and fp32 logits of each row's `count` likeliest, of logits or of keys; [B, count] each."""
    kept = _kept(count)
    source_BX = _narrowed(source_BX, kept, 0)
    ids_Bk = torch.empty(len(source_BX), kept, dtype=torch.int64, device=source_BX.device)
    logits_Bk = torch.empty(len(source_BX), kept, dtype=torch.float32, device=source_BX.device)
    _launch(source_BX, 0, kept, ids_Bk, logits_Bk)
    return ids_Bk[:, :count], logits_Bk[:, :count]


def _kept(count: int) -> int:
    largest: int = triton.next_power_of_2(count)
    return next((kept for kept in KEPT if kept >= count), largest)


def _narrowed(source_BX: Tensor, kept: int, first_id: int) -> Tensor:
    """What is left for one block."""
    while (num_blocks := triton.cdiv(source_BX.shape[1], _block(source_BX, kept))) > 1:
        keys_Bk = torch.empty(len(source_BX), num_blocks * kept, dtype=torch.int64, device=source_BX.device)
        _launch(source_BX, first_id, kept, keys_Bk, None)
        source_BX = keys_Bk
    return source_BX


def _block(source_BX: Tensor, kept: int) -> int:
    """At least twice as many as are kept of it."""
    block: int = max(2 * kept, min(BLOCK, triton.next_power_of_2(source_BX.shape[1])))
    return block


def _launch(source_BX: Tensor, first_id: int, kept: int, out: Tensor, logits_out: Tensor | None) -> None:
    num_rows, width = source_BX.shape
    block = _block(source_BX, kept)
    grid = (num_rows, triton.cdiv(width, block))
    if not num_rows:
        return
    if source_BX.dtype.is_floating_point:
        _best_logits[grid](source_BX, source_BX.stride(0), first_id, out, logits_out, width, kept, block)
    else:
        _best_keys[grid](source_BX, source_BX.stride(0), out, logits_out, width, kept, block)


@triton.jit
def _best_logits(
    source_ptr, source_stride, first_id, out_ptr, logits_out_ptr, width, KEPT: tl.constexpr, BLOCK: tl.constexpr
):
    row, place_B = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there_B = place_B < width
    # -0.0 becomes 0.0, its equal.
    logit_B = tl.load(source_ptr + row * source_stride + place_B, mask=is_there_B, other=0.0).to(tl.float32) + 0.0
    bits_B = logit_B.to(tl.int32, bitcast=True)
    # The bits of negative floats grow with their size: turned round, all bits grow with the value.
    ordered_B = bits_B ^ ((bits_B >> 31) & 0x7FFFFFFF)
    key_B = (ordered_B.to(tl.int64) << 32) + (0xFFFFFFFF - (first_id + place_B).to(tl.int64))
    _keep_best(tl.where(is_there_B, key_B, -0x8000000000000000), row, out_ptr, logits_out_ptr, KEPT)


@triton.jit
def _best_keys(source_ptr, source_stride, out_ptr, logits_out_ptr, width, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    row, place_B = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key_B = tl.load(source_ptr + row * source_stride + place_B, mask=place_B < width, other=-0x8000000000000000)
    _keep_best(key_B, row, out_ptr, logits_out_ptr, KEPT)


@triton.jit
def _keep_best(key_B, row, out_ptr, logits_out_ptr, KEPT: tl.constexpr):
    """Keys, or token ids and logits where there is room for these."""
    at_k = (row * tl.num_programs(1) + tl.program_id(1)) * KEPT + tl.arange(0, KEPT)
    if KEPT == 1:
        best_k = tl.max(key_B, axis=0, keep_dims=True)
    else:
        best_k = tl.topk(key_B, KEPT)
    if logits_out_ptr is None:
        tl.store(out_ptr + at_k, best_k)
    else:
        ordered_k = (best_k >> 32).to(tl.int32)
        bits_k = ordered_k ^ ((ordered_k >> 31) & 0x7FFFFFFF)
        tl.store(out_ptr + at_k, 0xFFFFFFFF - (best_k & 0xFFFFFFFF))
        tl.store(logits_out_ptr + at_k, bits_k.to(tl.float32, bitcast=True))
