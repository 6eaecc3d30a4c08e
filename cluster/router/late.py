"""Which of the ranks that wait for one another keeps the others waiting.

Hop 6, the Router's side, pure: events go in, facts come out; no clock, socket or await. `shards.py` drives it.

A rank tells how many exchanges with others it has begun: where one is behind, it is the one. Where none is, they all
wait in the same exchange on their devices, since hosts run ahead of those, and one device hangs before it. Then all are
woken out of their waits. A device that only waited is done at once, and its rank answers, with a result of no use or an
error: whose rank stays silent hangs by itself.
"""

from __future__ import annotations

from workers.layout import ParallelLayout
from workers.step import RankPulse

SILENT_S = 3.0
"""Three pulses that did not come."""


class Pulses:
    """When each rank was last heard of, and how far it was with its exchanges. The clock is the caller's."""

    def __init__(self, layout: ParallelLayout) -> None:
        self._tp = layout.tp
        self._heard_at_s: dict[int, float] = {}
        self._last: dict[int, RankPulse] = {}

    def heard(self, pulse: RankPulse, now_s: float) -> None:
        """A rank gave a sign of life."""
        self._heard_at_s[pulse.rank] = now_s
        self._last[pulse.rank] = pulse

    def silence_s(self, now_s: float) -> float:
        """Since the rank that is silent for longest was heard of."""
        return now_s - min(self._heard_at_s.values(), default=now_s)

    def silent(self, timeout_s: float, now_s: float) -> int | None:
        """A rank that was not heard of for so long; None: there is none."""
        return next((rank for rank, at_s in self._heard_at_s.items() if now_s - at_s > timeout_s), None)

    def suspects(self, late_ranks: list[int], now_s: float) -> list[int]:
        """Of ranks that wait for one another, those for which the others may wait: stopped, or behind. At least one."""
        silent_s = {rank: now_s - self._heard_at_s.get(rank, now_s) for rank in late_ranks}
        longest = max(silent_s, key=silent_s.__getitem__)
        if silent_s[longest] > SILENT_S:
            return [longest]
        behind = _least({rank: self._count(rank).num_exchanges for rank in late_ranks})
        # Exchanges of one attention group say nothing about another, which may have had less to do.
        groups: dict[int, dict[int, int]] = {}
        for rank in behind:
            groups.setdefault(rank // self._tp, {})[rank] = self._count(rank).num_group_exchanges
        return [rank for counts in groups.values() for rank in _least(counts)]

    def _count(self, rank: int) -> RankPulse:
        return self._last.get(rank, RankPulse(rank, 0))


def _least(counts: dict[int, int]) -> list[int]:
    least = min(counts.values())
    return [rank for rank, count in counts.items() if count == least]


class RollCall:
    """All late ranks are woken; who answers is not the one."""

    def __init__(self, late_ranks: list[int], suspects: list[int]) -> None:
        self._late, self._suspects = late_ranks, suspects
        self._awake: set[int] = set()

    def heard(self, rank: int) -> None:
        """It sent a result or an error, or ended."""
        self._awake.add(rank)

    @property
    def hanging(self) -> list[int]:
        """Who did not wake."""
        return [rank for rank in self._late if rank not in self._awake]

    @property
    def blamed(self) -> int:
        """Who hangs, and was a suspect before where several hang; a suspect where nobody does."""
        hanging = self.hanging
        return next((rank for rank in hanging if rank in self._suspects), (hanging or self._suspects)[0])


def lateness(rank: int, late_ranks: list[int], timeout_s: float) -> str:
    """What became of a step."""
    others = [other for other in late_ranks if other != rank]
    waiting = f" ({ranks_were(others)} waiting for it)" if others else ""
    return f"rank {rank} was late: no result within {timeout_s:g} s{waiting}"


def late_start(late_ranks: list[int], timeout_s: float) -> str:
    """What became of a group that did not come up."""
    return (
        f"{ranks_were(late_ranks)} not ready within {timeout_s:g} s; "
        "raise router.start_timeout_s if loading takes longer"
    )


def ranks_were(ranks: list[int]) -> str:
    """The beginning of a sentence."""
    names = ", ".join(str(rank) for rank in ranks)
    return f"rank {names} was" if len(ranks) == 1 else f"ranks {names} were"
