"""The gated activation of the feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up_TX: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension."""
    gate, up = gate_up_TX.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
