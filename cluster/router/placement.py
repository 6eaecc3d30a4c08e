"""Which rank holds which experts, so that all have the same work: replicas of hot experts, packed by load.

Hop 8's map, made here and sent to the ranks as a PlacementUpdate. Pure: loads in, placement out. After EPLB (DeepSeek,
2025): the hottest experts are replicated into the redundant slots, then packed heaviest first onto the least loaded
rank. Unlike it, an expert stays where it lies, or else on its node, as long as that is within the limit: what is moved
are weights, between steps of running streams.

A layer's placement is a list: physical slot -> logical expert, rank by rank, -1 where a slot holds none. A replicated
expert's tokens are spread evenly over its replicas.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from workers.placement_map import EMPTY_SLOT

SLACKS = (0.02, 0.05, 0.1, 0.2, 0.4)
"""How far above the mean a rank may be filled by experts that stay: with more, fewer move."""
GOOD_ENOUGH = 1.05
"""Among packings within this factor of the best one, that with the fewest moves is taken."""
LIGHT = 0.1
"""Experts that together make less than this share of a rank's mean load stay even on a full rank."""

LEAST_RELIEF = 0.002
"""A swap that relieves a rank by less than this share of its limit is not worth two moves."""


@dataclass(frozen=True, kw_only=True)
class ExpertGrid:
    """The ranks that experts are spread over."""

    num_experts: int
    """Logical ones."""
    slots_per_rank: int
    nodes: tuple[int, ...]
    """The node of each expert rank."""

    @property
    def num_ranks(self) -> int:
        return len(self.nodes)

    @property
    def num_slots(self) -> int:
        return self.slots_per_rank * self.num_ranks

    def rank_of(self, slot: int) -> int:
        return slot // self.slots_per_rank


def logical_loads(grid: ExpertGrid, slots: Sequence[int], slot_loads: Sequence[float]) -> list[float]:
    """Tokens of each logical expert, from those of each physical slot."""
    loads = [0.0] * grid.num_experts
    for expert, load in zip(slots, slot_loads, strict=True):
        if expert != EMPTY_SLOT:
            loads[expert] += load
    return loads


def rank_loads(grid: ExpertGrid, slots: Sequence[int], loads: Sequence[float]) -> list[float]:
    """Tokens of each rank when every expert's are spread evenly over its replicas."""
    counts = Counter(slots)
    ranks = [0.0] * grid.num_ranks
    for slot, expert in enumerate(slots):
        if expert != EMPTY_SLOT:
            ranks[grid.rank_of(slot)] += loads[expert] / counts[expert]
    return ranks


def imbalance(loads: Sequence[float]) -> float:
    """Largest over mean; 1 is perfect, and what nothing at all has."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def num_moves(grid: ExpertGrid, old: Sequence[int], new: Sequence[int]) -> int:
    """Experts that must travel to a rank that has not had them."""
    size = grid.slots_per_rank
    return sum(
        len(set(new[first : first + size]) - set(old[first : first + size]) - {EMPTY_SLOT})
        for first in range(0, grid.num_slots, size)
    )


def replica_counts(grid: ExpertGrid, loads: Sequence[float]) -> list[int]:
    """Replicas of each expert: every further slot goes to the expert with the most load per replica.

    More than one on a rank would be of no use.
    """
    counts = [1] * grid.num_experts
    hottest = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(hottest)
    for _ in range(grid.num_slots - grid.num_experts):
        while hottest and counts[hottest[0][1]] == grid.num_ranks:
            heapq.heappop(hottest)
        if not hottest or hottest[0][0] == 0:
            break
        _, expert = hottest[0]
        counts[expert] += 1
        heapq.heapreplace(hottest, (-loads[expert] / counts[expert], expert))
    return counts


def place_layer(grid: ExpertGrid, current: Sequence[int], loads: Sequence[float]) -> list[int]:
    """A placement of one layer in which ranks have about the same load, with few moves from the current one."""
    counts = replica_counts(grid, loads)
    packings = [list(current), *(_Packing(grid, current, loads, counts, slack).pack() for slack in SLACKS)]
    heights = [imbalance(rank_loads(grid, slots, loads)) for slots in packings]
    good = [slots for slots, height in zip(packings, heights, strict=True) if height <= GOOD_ENOUGH * min(heights)]
    return min(good, key=lambda slots: num_moves(grid, current, slots))


class _Packing:
    """Fills ranks with experts, the heaviest first."""

    def __init__(
        self, grid: ExpertGrid, current: Sequence[int], loads: Sequence[float], counts: Sequence[int], slack: float
    ) -> None:
        self._grid = grid
        self._current = current
        self._counts = counts
        self._weights = [load / count for load, count in zip(loads, counts, strict=True)]
        mean = sum(loads) / grid.num_ranks
        self._limit = (1 + slack) * mean
        self._light = LIGHT * mean / grid.slots_per_rank
        self._rank_loads = [0.0] * grid.num_ranks
        self._held: list[set[int]] = [set() for _ in range(grid.num_ranks)]
        self._homes: list[list[int]] = [[] for _ in range(grid.num_experts)]
        for slot, expert in enumerate(current):
            if expert != EMPTY_SLOT:
                self._homes[expert].append(grid.rank_of(slot))

    def pack(self) -> list[int]:
        for expert in sorted(range(self._grid.num_experts), key=lambda expert: (-self._weights[expert], expert)):
            for _ in range(self._counts[expert]):
                rank = self._rank_for(expert)
                if rank is None:
                    break  # a replica that no other rank has a slot for; the first always finds one
                self._held[rank].add(expert)
                self._rank_loads[rank] += self._weights[expert]
        while self._swap_once():
            pass
        return self._lay_out()

    def _rank_for(self, expert: int) -> int | None:
        """A rank that has it already, or one on a node that has it, as long as the limit allows; else the emptiest."""
        homes = self._homes[expert]
        if (rank := self._emptiest(expert, homes)) is not None and self._may_stay(expert, rank):
            return rank
        nodes = {self._grid.nodes[rank] for rank in homes}
        near = [rank for rank in range(self._grid.num_ranks) if self._grid.nodes[rank] in nodes]
        if (rank := self._emptiest(expert, near)) is not None and self._fits(expert, rank):
            return rank
        return self._emptiest(expert, range(self._grid.num_ranks))

    def _emptiest(self, expert: int, ranks: Sequence[int]) -> int | None:
        free = [r for r in ranks if len(self._held[r]) < self._grid.slots_per_rank and expert not in self._held[r]]
        return min(free, key=lambda rank: (self._rank_loads[rank], rank), default=None)

    def _fits(self, expert: int, rank: int) -> bool:
        return self._rank_loads[rank] + self._weights[expert] <= self._limit

    def _may_stay(self, expert: int, rank: int) -> bool:
        return self._weights[expert] <= self._light or self._fits(expert, rank)

    def _swap_once(self) -> bool:
        """Relieve the fullest rank, where it is above the limit, by the swap that levels it best with another."""
        hot = max(range(self._grid.num_ranks), key=lambda rank: (self._rank_loads[rank], -rank))
        if self._rank_loads[hot] <= self._limit:
            return False
        swaps = [swap for rank in range(self._grid.num_ranks) if (swap := self._best_swap(hot, rank)) is not None]
        if not swaps:
            return False
        _, rank, out, back = min(swaps)
        self._held[hot] ^= {out, back}
        self._held[rank] ^= {out, back}
        moved = self._weights[out] - self._weights[back]
        self._rank_loads[hot] -= moved
        self._rank_loads[rank] += moved
        return True

    def _best_swap(self, hot: int, cold: int) -> tuple[float, int, int, int] | None:
        """(load of the fuller afterwards, cold, expert that goes there, expert that comes back), if it helps."""
        gap = self._rank_loads[hot] - self._rank_loads[cold]
        least = LEAST_RELIEF * self._limit
        outs, backs = sorted(self._held[hot] - self._held[cold]), sorted(self._held[cold] - self._held[hot])
        best: tuple[float, int, int, int] | None = None
        for out in outs:
            for back in backs:
                moved = self._weights[out] - self._weights[back]
                # Both ends bounded away from zero, or rounding could let two ranks swap back and forth for ever.
                if least < moved < gap - least:
                    fuller = self._rank_loads[cold] + max(moved, gap - moved)
                    best = min(best or (fuller, cold, out, back), (fuller, cold, out, back))
        return best

    def _lay_out(self) -> list[int]:
        """Who stays on a rank keeps its slot; the others take the slots that are left."""
        size = self._grid.slots_per_rank
        slots: list[int] = []
        for rank, held in enumerate(self._held):
            old = self._current[rank * size : (rank + 1) * size]
            new = iter(sorted(held - set(old)))
            slots += [expert if expert in held else next(new, EMPTY_SLOT) for expert in old]
        return slots
