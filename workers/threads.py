"""How many CPU threads a step is worth.

Threads meet at a barrier after every operation. Where a step is a few milliseconds of arithmetic they gain little, and
on a busy machine each barrier may wait for the scheduler: a decode of the built-in checkpoint took 5 ms on one thread,
and 87 ms on two of two cores that were also training a model.
"""

from __future__ import annotations

import torch

from workers.config import ModelConfig
from workers.kernels.linear import Weight

SERIAL_FLOPS = 1e8
"""Up to about 2 ms on one core: on a quiet machine two threads then gain 2 to 6 % at 8 and 32 streams."""


class ThreadChooser:
    """Sets torch's thread count before each step: one for small steps, all of the rank's for large ones."""

    def __init__(self, model: ModelConfig, weights: dict[str, Weight], num_threads: int) -> None:
        self.num_threads = num_threads
        self.flops_per_token = 2 * sum(_active_elements(model, name, weight) for name, weight in weights.items())

    def choose(self, num_tokens: int) -> int:
        """Threads for a step of so many tokens."""
        return 1 if num_tokens * self.flops_per_token <= SERIAL_FLOPS else self.num_threads

    def apply(self, num_tokens: int) -> None:
        """For torch operations that this Python thread starts from now on."""
        threads = self.choose(num_tokens)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)


def _active_elements(model: ModelConfig, name: str, weight: Weight) -> float:
    """Elements that one token is multiplied with."""
    if name == "embed" and not model.tie_word_embeddings:
        return 0
    if ".experts." in name:
        return weight.numel() * model.num_experts_per_token / model.num_experts
    return weight.numel()
