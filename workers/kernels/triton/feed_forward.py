"""The dense products of a layer as its weights in tiles want them: rows are quantised on the way in, and parts of a sum
are left to whoever reads it.

T tokens, H hidden, F ffn, X is 2F, I in, O out.
"""

from __future__ import annotations

from torch import Tensor

from workers.kernels.sums import PartialSums, Sums
from workers.kernels.tiles import TileWeight
from workers.kernels.triton import gemm
from workers.kernels.triton.quantize import quantize
from workers.kernels.triton.rows import QuantizedRows
from workers.kernels.triton.swiglu import swiglu_quantize


def linear(x_TI: Tensor | QuantizedRows, weight_OI: TileWeight) -> Sums:
    """x @ weight.T, [T, O]."""
    rows = _quantized(x_TI)
    parts_SRO = gemm.partial_linear(rows, weight_OI)
    return parts_SRO[0] if len(parts_SRO) == 1 else PartialSums(parts_SRO, rows.dtype)


def feed_forward(x_TH: Tensor | QuantizedRows, gate_up_XH: TileWeight, down_HF: TileWeight) -> Sums:
    """down(silu(gate(x)) * up(x)), [T, H]: splits are summed and rows quantised where the activation is applied."""
    rows = _quantized(x_TH)
    gate_up_STX = gemm.partial_linear(rows, gate_up_XH)
    return linear(swiglu_quantize(gate_up_STX, rows.dtype), down_HF)


def _quantized(x_TI: Tensor | QuantizedRows) -> QuantizedRows:
    return x_TI if isinstance(x_TI, QuantizedRows) else quantize(x_TI)
