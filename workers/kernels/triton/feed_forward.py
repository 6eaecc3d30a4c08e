"""The dense products of a layer as its weights in tiles want them: rows are quantised on the way in.

T tokens, H hidden, F ffn, X is 2F, I in, O out.
"""

from __future__ import annotations

from torch import Tensor

from workers.kernels.tiles import TileWeight
from workers.kernels.triton import gemm
from workers.kernels.triton.quantize import quantize
from workers.kernels.triton.swiglu import swiglu_quantize


def linear(x_TI: Tensor, weight_OI: TileWeight) -> Tensor:
    """x @ weight.T, [T, O]."""
    return gemm.linear(quantize(x_TI), weight_OI, x_TI.dtype)


def feed_forward(x_TH: Tensor, gate_up_XH: TileWeight, down_HF: TileWeight) -> Tensor:
    """down(silu(gate(x)) * up(x)), [T, H]: splits are summed and rows quantised where the activation is applied."""
    gate_up_STX = gemm.partial_linear(quantize(x_TH), gate_up_XH, x_TH.dtype)
    return gemm.linear(swiglu_quantize(gate_up_STX, x_TH.dtype), down_HF, x_TH.dtype)
