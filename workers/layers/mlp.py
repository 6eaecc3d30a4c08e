"""The dense feed-forward layer on this rank's tiles."""

from __future__ import annotations

from torch import Tensor

from workers.kernels.cpu.halves import FeedForwardHalf, panels
from workers.kernels.linear import Rows, Weight, feed_forward
from workers.kernels.sums import Sums


class DenseMLP:
    """Holds gate, up and down of one layer. Its output is this rank's part of a sum over ranks."""

    def __init__(self, layer: int, weights: dict[str, Weight]) -> None:
        self.gate_up, self.down = weights[f"layers.{layer}.gate_up"], weights[f"layers.{layer}.down"]

    def half(self, norm_H: Tensor, eps: float) -> FeedForwardHalf | None:
        """All of it and the norm before it in one call, where it can be."""
        found = panels(self.gate_up, self.down)
        return None if found is None else FeedForwardHalf(norm_H, found[0], found[1], eps)

    @property
    def is_in_order(self) -> bool:
        """There are no experts to be out of it."""
        return True

    def __call__(self, x_TH: Rows) -> Sums:
        return feed_forward(x_TH, self.gate_up, self.down)
