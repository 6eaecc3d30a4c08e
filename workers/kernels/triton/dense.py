"""Products with an unquantised weight whose bits do not depend on the number of rows: the gate, and the head.

torch's own choose their way by the number of rows, and with it the order of sums. One block shape, inputs in order.
R rows, O outputs, I inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.numerics import cast, dot

BLOCK_O = 64
BLOCK_R = 64
BLOCK_I = 64


def linear(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """x @ weight.T, [R, O], summed in fp32."""
    (num_rows, size_in), num_outputs = x_RI.shape, weight_OI.shape[0]
    out_RO = torch.empty(num_rows, num_outputs, dtype=x_RI.dtype, device=x_RI.device)
    if num_rows:
        _gemm[(triton.cdiv(num_outputs, BLOCK_O), triton.cdiv(num_rows, BLOCK_R))](
            *(x_RI, *x_RI.stride(), weight_OI, *weight_OI.stride(), out_RO),
            *(num_rows, num_outputs, size_in, BLOCK_O, BLOCK_R, BLOCK_I),
            num_warps=4,
            num_stages=3,
        )
    return out_RO


@triton.jit(do_not_specialize=["num_rows"])
def _gemm(
    x_ptr,
    x_stride_r,
    x_stride_i,
    weight_ptr,
    weight_stride_o,
    weight_stride_i,
    out_ptr,
    num_rows,
    num_outputs,
    size_in,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    output_O = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_R = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_output_O, is_row_R = output_O < num_outputs, row_R < num_rows
    sum_OR = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for first in range(0, size_in, BLOCK_I):
        input_I = first + tl.arange(0, BLOCK_I)
        is_input_I = input_I < size_in
        weight_ptr_OI = weight_ptr + output_O[:, None] * weight_stride_o + input_I[None, :] * weight_stride_i
        x_ptr_IR = x_ptr + row_R[None, :] * x_stride_r + input_I[:, None] * x_stride_i
        weight_OI = tl.load(weight_ptr_OI, mask=is_output_O[:, None] & is_input_I[None, :], other=0.0)
        x_IR = tl.load(x_ptr_IR, mask=is_input_I[:, None] & is_row_R[None, :], other=0.0)
        sum_OR += dot(weight_OI, x_IR)
    out_ptr_OR = out_ptr + row_R[None, :] * num_outputs + output_O[:, None]
    tl.store(out_ptr_OR, cast(sum_OR, out_ptr.dtype.element_ty), mask=is_output_O[:, None] & is_row_R[None, :])
