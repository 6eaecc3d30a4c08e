"""Matrix product with a weight stored as [out, in]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """x_TI @ weight_OI.T, in the weights' dtype: fp32 on a CPU, bf16 on a GPU."""
    return F.linear(x_TI, weight_OI)
