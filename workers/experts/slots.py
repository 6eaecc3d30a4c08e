"""From the experts that the gate chose to the physical slots that hold them, and how much each slot here has to do.

T tokens, K chosen experts per token, E experts, R replicas of the most replicated one, e local slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.placement_map import slots_of


class ReplicaTable:
    """One layer's placement. Replicas hold the same weights, so any of them gives the same result."""

    def __init__(self, placement: list[int], num_experts: int, device: torch.device) -> None:
        slots = slots_of(placement, num_experts)
        most = max(len(replicas) for replicas in slots)
        table = [[replicas[index % len(replicas)] for index in range(most)] for replicas in slots]
        self.slots_ER = torch.tensor(table, dtype=torch.int64, device=device)
        self.num_replicas_E = torch.tensor([len(replicas) for replicas in slots], dtype=torch.int64, device=device)
        self.is_identity = slots == [[expert] for expert in range(num_experts)]

    def slots(self, topk_ids_TK: Tensor) -> Tensor:
        """Physical slots, [T, K]. Neighbouring tokens take different replicas."""
        if self.is_identity:
            return topk_ids_TK
        if self.slots_ER.shape[1] == 1:
            return self.slots_ER[:, 0][topk_ids_TK]
        rows_T1 = torch.arange(len(topk_ids_TK), device=topk_ids_TK.device).unsqueeze(1)
        return self.slots_ER[topk_ids_TK, rows_T1 % self.num_replicas_E[topk_ids_TK]]


class SlotLoads:
    """(token, expert) pairs of each local slot, until they are taken; whoever computes them counts them."""

    def __init__(self, num_local: int, device: torch.device) -> None:
        self.counts_e = torch.zeros(num_local, dtype=torch.int64, device=device)

    def take(self) -> list[int]:
        """The counts since the last call."""
        counts: list[int] = self.counts_e.tolist()
        self.counts_e.zero_()
        return counts
