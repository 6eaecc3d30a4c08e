"""Which expert lies in which physical slot: the numbering that the Router and the ranks share.

Slots are numbered rank by rank: expert-parallel rank e holds [e * S, (e + 1) * S). Integers only, no torch: both the
control plane and the data plane import this.
"""

from __future__ import annotations

from typing import NamedTuple

EMPTY_SLOT = -1
"""In a placement: the slot holds no expert."""


def slots_per_rank(num_experts: int, redundant: int, ep: int) -> int:
    """S: slots of each expert-parallel rank and layer, the same everywhere."""
    return -(-(num_experts + redundant) // ep)


def initial_placement(num_experts: int, redundant: int, ep: int) -> list[int]:
    """Physical slot -> logical expert before any update.

    Experts lie in order, then come copies of the first `redundant` ones; ranks differ by at most one, and a rank's
    empty slot is its last.
    """
    size, total = slots_per_rank(num_experts, redundant, ep), num_experts + redundant
    placement: list[int] = []
    for rank in range(ep):
        held = [index % num_experts for index in range(total * rank // ep, total * (rank + 1) // ep)]
        placement += held + [EMPTY_SLOT] * (size - len(held))
    return placement


def slots_of(placement: list[int], num_experts: int) -> list[list[int]]:
    """Logical expert -> the physical slots that hold it, ascending."""
    slots: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(placement):
        if expert != EMPTY_SLOT:
            slots[expert].append(slot)
    return slots


def placement_problem(placement: list[int], num_experts: int, num_slots: int) -> str | None:
    """What is wrong with a layer's placement, or None."""
    if len(placement) != num_slots:
        return f"{len(placement)} slots, the ranks have {num_slots}"
    outside = [expert for expert in placement if not EMPTY_SLOT <= expert < num_experts]
    if outside:
        return f"expert {outside[0]} is outside [0, {num_experts})"
    missing = set(range(num_experts)).difference(placement)
    return f"expert {min(missing)} has no slot" if missing else None


class Move(NamedTuple):
    """An expert's weights go from one slot to another, of the same rank or not."""

    source: int
    target: int


def moves_between(old: list[int], new: list[int], slots_per_rank: int) -> list[Move]:
    """The slots that change, by target; a copy on the same rank is preferred, and others take turns as sources."""
    holders: dict[int, list[int]] = {}
    for slot, expert in enumerate(old):
        holders.setdefault(expert, []).append(slot)
    moves = []
    for target, expert in enumerate(new):
        if expert in (old[target], EMPTY_SLOT):
            continue
        near = [slot for slot in holders[expert] if slot // slots_per_rank == target // slots_per_rank]
        choices = near or holders[expert]
        moves.append(Move(choices[target % len(choices)], target))
    return moves
