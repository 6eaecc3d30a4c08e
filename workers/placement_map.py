"""Where experts lie at first: plain integers, for the Router and for the ranks.

A physical slot holds one logical expert or is empty (-1, as in `PlacementUpdate`). Slots are numbered rank by rank: expert
rank e has slots [e * S, (e + 1) * S) in every MoE layer.
"""

from __future__ import annotations

EMPTY = -1


def slots_per_rank(num_experts: int, redundant: int, ep: int) -> int:
    """Physical slots of one rank: S, the same on every rank."""
    return -(-(num_experts + redundant) // ep)


def initial_placement(num_experts: int, redundant: int, ep: int) -> list[int]:
    """Slot -> logical expert before any update: consecutive experts on each rank, in numbers that differ by at most one;
    the room for replicas is empty."""
    size = slots_per_rank(num_experts, redundant, ep)
    slots: list[int] = []
    for rank in range(ep):
        held = range(num_experts * rank // ep, num_experts * (rank + 1) // ep)
        slots += [*held, *[EMPTY] * (size - len(held))]
    return slots
