"""From the experts that the gate chose to the physical slots that hold them, and how much each slot here has to do.

T tokens, K chosen experts per token, E experts, R replicas of an expert at most, e local slots.
"""

from __future__ import annotations

import numpy as np
import torch

from workers.kernels.gate import Replicas
from workers.placement_map import slots_of
from workers.transfers import to_device


class ReplicaTable:
    """One layer's placement. Replicas hold the same weights, so any of them gives the same result.

    It changes in place, and how it is read depends on no placement: a recorded step follows the experts that move.
    """

    def __init__(self, placement: list[int], num_experts: int, device: torch.device, *, can_change: bool) -> None:
        self._num_experts, self._device, self._can_change = num_experts, device, can_change
        most = len(placement) - num_experts + 1  # where all slots that are over hold one expert
        slots_ER = torch.zeros(num_experts, most, dtype=torch.int64, device=device)
        self._replicas = Replicas(slots_ER, torch.zeros(num_experts, dtype=torch.int64, device=device))
        self.place(placement)

    def place(self, placement: list[int]) -> None:
        """By another placement from now on."""
        slots, (slots_ER, counts_E) = slots_of(placement, self._num_experts), self._replicas
        table = [[replicas[index % len(replicas)] for index in range(slots_ER.shape[1])] for replicas in slots]
        slots_ER.copy_(to_device(np.array(table, dtype=np.int64), self._device), non_blocking=True)
        counts = np.array([len(replicas) for replicas in slots], dtype=np.int64)
        counts_E.copy_(to_device(counts, self._device), non_blocking=True)
        self.is_identity = slots == [[expert] for expert in range(self._num_experts)]

    @property
    def replicas(self) -> Replicas | None:
        """None: an expert's number is its slot's, for good."""
        return None if self.is_identity and not self._can_change else self._replicas


class SlotLoads:
    """(token, expert) pairs of each local slot: who computes them counts them, `PlacedExperts` takes all layers'."""

    def __init__(self, num_local: int, device: torch.device) -> None:
        self.counts_e = torch.zeros(num_local, dtype=torch.int64, device=device)
