"""A product in parts, as the GPU's kernels leave it where its inputs are split: its reader adds them up on the way.

By itself the sum is a launch, which in a decode step takes as long as what it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PartialSums:
    """Not yet a tensor [R, O]: the sum over S in order, in `dtype`. R rows, O outputs, S splits of the inputs."""

    parts_SRO: Tensor
    """fp32, contiguous."""
    dtype: torch.dtype


Sums = Tensor | PartialSums
"""What is to be added to the residual, or read as heads."""


def summed(product: Sums) -> Tensor:
    """[R, O], for readers that do not add."""
    if isinstance(product, Tensor):
        return product
    from workers.kernels.triton import gemm

    return gemm.sum_splits(product.parts_SRO, product.dtype)
