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


def likeliest_keys(logits_Bv: Tensor, count: int) -> Tensor:
    """Keys of each row's `count` likeliest, largest first: [B, count], int64, as `workers.candidates` packs them."""
    num_rows, width = logits_Bv.shape
    kept = triton.next_power_of_2(count)
    block = max(2 * kept, min(BLOCK, triton.next_power_of_2(width)))
    source = logits_Bv
    while True:
        num_blocks = triton.cdiv(width, block)
        keys_Bk = torch.empty(num_rows, num_blocks * kept, dtype=torch.int64, device=source.device)
        if num_rows:
            kernel = _best_logits if source.dtype.is_floating_point else _best_keys
            kernel[(num_rows, num_blocks)](source, source.stride(0), keys_Bk, width, kept, block)
        if num_blocks == 1:
            return keys_Bk[:, :count]
        source, width = keys_Bk, num_blocks * kept
        block = max(2 * kept, min(BLOCK, triton.next_power_of_2(width)))


@triton.jit
def _best_logits(logits_ptr, logits_stride, out_ptr, width, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    row, id_B = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there_B = id_B < width
    # -0.0 becomes 0.0, its equal.
    logit_B = tl.load(logits_ptr + row * logits_stride + id_B, mask=is_there_B, other=0.0).to(tl.float32) + 0.0
    bits_B = logit_B.to(tl.int32, bitcast=True)
    # The bits of negative floats grow with their size: turned round, all bits grow with the value.
    ordered_B = bits_B ^ ((bits_B >> 31) & 0x7FFFFFFF)
    key_B = (ordered_B.to(tl.int64) << 32) + (0xFFFFFFFF - id_B.to(tl.int64))
    _keep_best(tl.where(is_there_B, key_B, -0x8000000000000000), row, out_ptr, KEPT)


@triton.jit
def _best_keys(keys_ptr, keys_stride, out_ptr, width, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    row, place_B = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key_B = tl.load(keys_ptr + row * keys_stride + place_B, mask=place_B < width, other=-0x8000000000000000)
    _keep_best(key_B, row, out_ptr, KEPT)


@triton.jit
def _keep_best(key_B, row, out_ptr, KEPT: tl.constexpr):
    out_ptr += (row * tl.num_programs(1) + tl.program_id(1)) * KEPT
    if KEPT == 1:
        tl.store(out_ptr, tl.max(key_B, axis=0))
    else:
        tl.store(out_ptr + tl.arange(0, KEPT), tl.topk(key_B, KEPT))
