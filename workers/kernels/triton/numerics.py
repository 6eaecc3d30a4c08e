"""Products and casts that mean the same on a GPU and in Triton's interpreter.

The interpreter multiplies the bit patterns of bf16, cuts bf16 off where a GPU rounds, and loses a carry when it rounds
to e4m3: here products are of fp32 and values are rounded before they are cast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
INTERPRETED: tl.constexpr = tl.constexpr(knobs.runtime.interpret)
E4M3_MAX: tl.constexpr = tl.constexpr(448.0)
LEAST_LARGEST: tl.constexpr = tl.constexpr(1e-12)
"""Keeps the scale of zeros from being zero."""
TILE: tl.constexpr = tl.constexpr(128)
"""Columns of an activation that share a scale, and rows and columns of a weight that do."""


@triton.jit
def dot(a, b):
    """a @ b, summed in fp32."""
    if INTERPRETED:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return product


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """fp32 to a narrower type, rounded to the nearest, halves to even; e4m3 saturates."""
    if tl.float8e4nv == DTYPE:
        x = tl.minimum(tl.maximum(x, -E4M3_MAX), E4M3_MAX)
    if INTERPRETED:
        if tl.float8e4nv == DTYPE:
            # Below 2**-6 all steps are 2**-9: adding 1.5 * 2**14 leaves fp32 no finer ones.
            tiny = (x + 24576.0) - 24576.0
            x = tl.where(tl.abs(x) < 0.015625, tiny, _round_bits(x, 20))
        if tl.bfloat16 == DTYPE:
            x = _round_bits(x, 16)
    return x.to(DTYPE)


@triton.jit
def _round_bits(x, NUM_CUT: tl.constexpr):
    """fp32 without its last bits."""
    bits = x.to(tl.int32, bitcast=True)
    bits += (1 << (NUM_CUT - 1)) - 1 + ((bits >> NUM_CUT) & 1)
    return ((bits >> NUM_CUT) << NUM_CUT).to(tl.float32, bitcast=True)


@triton.jit
def quantized(x_RC):
    """Rows of TILE columns as values within e4m3's range, and the scale of each row."""
    largest_R = tl.maximum(tl.max(tl.abs(x_RC), axis=1), LEAST_LARGEST)
    scale_R = largest_R / E4M3_MAX
    return x_RC / scale_R[:, None], scale_R
