"""Muon: momentum whose matrix updates are orthogonalised (Keller Jordan's Newton-Schulz iteration)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(gradient: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix, roughly, whose singular values are all one; leading dimensions are batches."""
    a, b, c = NEWTON_SCHULZ
    wide = gradient.shape[-1] >= gradient.shape[-2]
    x: Tensor = gradient if wide else gradient.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """For stacks of matrices; a parameter that has `row_blocks` is cut along its rows into that many matrices."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002  # of every torch optimizer
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                buffer = state["momentum"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])
                num_blocks = getattr(parameter, "row_blocks", 1)
                blocks = update.reshape(*update.shape[:-2], num_blocks, -1, update.shape[-1])
                rows, columns = blocks.shape[-2:]
                update = orthogonalise(blocks).reshape(parameter.shape)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
