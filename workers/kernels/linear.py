"""Matrix product with a weight [out, in], and how such a weight lies in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels.cpu.library import native
from workers.kernels.cpu.panels import PanelWeight
from workers.kernels.invariance import is_invariant
from workers.kernels.sums import Sums, summed
from workers.kernels.swiglu import swiglu
from workers.kernels.tiles import TileWeight
from workers.kernels.triton.choice import has_triton
from workers.kernels.triton.rows import QuantizedRows

Weight = Tensor | PanelWeight | TileWeight
Rows = Tensor | QuantizedRows
"""What is multiplied; quantised already where it is for a weight in tiles."""


def linear(x_TI: Rows, weight_OI: Weight) -> Tensor:
    """x_TI @ weight_OI.T, in fp32 on a CPU, in bf16 on a GPU, where rows are quantised for a weight in tiles."""
    return summed(unsummed_linear(x_TI, weight_OI))


def unsummed_linear(x_TI: Rows, weight_OI: Weight) -> Sums:
    """The same for a reader that adds up."""
    if isinstance(weight_OI, TileWeight):
        from workers.kernels.triton import feed_forward

        return feed_forward.linear(x_TI, weight_OI)
    assert isinstance(x_TI, Tensor), "rows are quantised for tiles alone"
    if isinstance(weight_OI, PanelWeight):
        return _panel_linear(x_TI, weight_OI, weight_OI.first_row + weight_OI.num_rows)[:, weight_OI.first_row :]
    if is_invariant() and has_triton(x_TI.device.type):
        from workers.kernels.triton import dense

        return dense.linear(x_TI, weight_OI)
    return torch.mm(x_TI, weight_OI.t())


def swiglu_linear(x_TI: Tensor, gate_up_XI: Weight) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T), [T, X / 2]; the gate's rows are the first half."""
    if isinstance(gate_up_XI, PanelWeight) and gate_up_XI.is_paired:
        return _panel_linear(x_TI, gate_up_XI, gate_up_XI.num_rows // 2)
    return swiglu(linear(x_TI, gate_up_XI))


def feed_forward(x_TH: Rows, gate_up_XH: Weight, down_HF: Weight) -> Sums:
    """down(silu(gate(x)) * up(x)), [T, H]."""
    if isinstance(gate_up_XH, TileWeight) and isinstance(down_HF, TileWeight):
        from workers.kernels.triton import feed_forward as in_tiles

        return in_tiles.feed_forward(x_TH, gate_up_XH, down_HF)
    assert isinstance(x_TH, Tensor), "rows are quantised for tiles alone"
    return linear(swiglu_linear(x_TH, gate_up_XH), down_HF)


def vector(weights: dict[str, Weight], name: str) -> Tensor:
    """A parameter that is no matrix."""
    weight = weights[name]
    assert isinstance(weight, Tensor), f"{name} is a vector"
    return weight


def parts_of(weight: Weight) -> tuple[Tensor, ...]:
    """The tensors that a weight is made of; those of an expert parameter are stacked over experts."""
    return (weight,) if isinstance(weight, Tensor) else weight.tensors()


def rows_of(weight_OI: Weight, start: int, stop: int) -> Weight:
    """Rows [start, stop) of a weight, sharing its values."""
    return weight_OI[start:stop] if isinstance(weight_OI, Tensor) else weight_OI.rows(start, stop)


def _panel_linear(x_TI: Tensor, weight: PanelWeight, num_outputs: int) -> Tensor:
    library = native()
    assert library is not None, "panels exist only where there are kernels to read them"
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    num_rows = x_TI.shape[0]
    out_TO = torch.empty(num_rows, num_outputs)
    library.mull_linear(x_TI.data_ptr(), x_TI.stride(0), num_rows, weight.address, out_TO.data_ptr(), num_outputs)
    return out_TO


def empty_weight(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """A weight [*stack, out, in] whose columns are contiguous.

    For the few rows of a decode step a CPU multiplies by it in 60 to 80 % of the time that contiguous rows take.
    """
    *stack, size_out, size_in = shape
    return torch.empty(*stack, size_in, size_out, dtype=dtype, device=device).transpose(-1, -2)
