"""What else computes what our kernels do, on the same GPU: torch's own, where it has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels import reference as plain
from workers.kernels.tiles import TileWeight

Launch = Callable[[], Any]


def grouped_mm(x: Tensor, slots: Tensor, layer: tuple[TileWeight, TileWeight]) -> dict[str, list[Launch]]:
    """torch's grouped product on unpacked experts, of rows that are sorted already, and without their sum."""
    gate_up, down = (weight.dense().to(x.dtype).mT for weight in layer)
    order = slots.flatten().sort(stable=True)
    is_here = order.values < len(gate_up)
    rows = x[(order.indices // slots.shape[1])[is_here]]
    ends = order.values[is_here].bincount(minlength=len(gate_up)).cumsum(0).int()

    def compute() -> Tensor:
        hidden = plain.swiglu(torch._grouped_mm(rows, gate_up, offs=ends))
        return torch._grouped_mm(hidden, down, offs=ends)

    return {"torch grouped_mm, unpacked": [compute]} if len(rows) else {}


def sdpa(q: Tensor, pool: Tensor, num_keys: int) -> Launch:
    """Of keys that lie one behind the other, as if the pool were no pages."""
    k, v = pool.view(2, len(q), 1, -1, q.shape[-1])[:, :, :, :num_keys]
    return lambda: F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)
