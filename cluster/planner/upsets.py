"""What may happen to a fleet while it serves: ranks or Routers are lost, an update is rolled out, copies come and go.

Each does to the simulated copies what the product does to real ones, in the time that the data of `operations` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cluster.planner.devices import Device
from cluster.planner.fleet import Fleet
from cluster.planner.layouts import Fit
from cluster.planner.operations import Operations
from cluster.planner.sim_copy import SimCopy

Kind = Literal["lose-rank", "silent-rank", "lose-router", "double-load", "rolling-update", "scale"]
_DRAIN_LOOK_S = 1.0
"""A Router that drains ends as soon as it has nothing left."""


@dataclass(frozen=True, kw_only=True)
class Upset:
    """Something that is to happen."""

    time_s: float
    kind: Kind

    @property
    def is_everywhere(self) -> bool:
        """Not in one copy alone: in each cell of a fleet."""
        return self.kind in ("double-load", "rolling-update")


@dataclass(kw_only=True)
class Happened:
    """It did."""

    time_s: float
    kind: Kind
    words: str


class Operator:
    """Does things to a fleet, and keeps a log of them."""

    def __init__(self, fleet: Fleet, fit: Fit, device: Device, operations: Operations) -> None:
        self.log: list[Happened] = []
        self._fleet = fleet
        self._serve = operations.serve
        self._drain_s = operations.router.drain_s
        self._step_timeout_s = operations.router.step_timeout_s
        self._node_s = operations.starting.node_s
        self._rank_s = operations.starting.rank_s(fit)
        self.copy_start_s = operations.starting.copy_s(fit, device)

    def arrange(self, upset: Upset) -> None:
        """Let it happen when its time comes."""
        do: dict[Kind, Callable[[], object]] = {
            "lose-rank": self.lose_rank,
            "silent-rank": self.silence_rank,
            "lose-router": self.lose_router,
            "rolling-update": self.roll,
            "double-load": lambda: self._note("double-load", "twice as many requests come from now on"),
        }
        self._fleet.at(upset.time_s, do[upset.kind])

    def lose_rank(self) -> None:
        """A process ends: its Router notices at once and starts it again; the other ranks keep their weights."""
        copy = self._busiest()
        if copy is None:
            self._note("lose-rank", "no copy took work: nothing more was lost")
            return
        self._note(
            "lose-rank", f"a rank of {copy.name} ended with {len(copy.flights)} requests; back in {self._rank_s:.0f} s"
        )
        self._fleet.lose_ranks(copy)
        self._fleet.at(self._fleet.now_s + self._rank_s, lambda: self._ranks_back(copy))

    def silence_rank(self) -> None:
        """A process stands still, its Router counts it as lost after the longest that a step may take."""
        copy = self._busiest(but_silent=True)
        if copy is None:
            self._note("silent-rank", "no copy took work: nothing more fell silent")
            return
        self._note(
            "silent-rank",
            f"a rank of {copy.name} fell silent with {len(copy.flights)} requests; noticed after "
            f"{self._step_timeout_s:.0f} s, back in {self._rank_s:.0f} s more",
        )
        self._fleet.silence(copy)
        since_s = copy.silent_since_s
        self._fleet.at(self._fleet.now_s + self._step_timeout_s, lambda: self._notice(copy, since_s))

    def _notice(self, copy: SimCopy, since_s: float | None) -> None:
        """Unless it was lost or replaced meanwhile, with its silent rank."""
        if copy.name in self._fleet.copies and copy.silent_since_s == since_s:
            self._fleet.lose_ranks(copy)
            self._fleet.at(self._fleet.now_s + self._rank_s, lambda: self._ranks_back(copy))

    def lose_router(self) -> None:
        """Its gateways notice at once and go elsewhere; Serve starts it again with all its ranks."""
        copy = self._busiest()
        if copy is None:
            self._note("lose-router", "no copy took work: nothing more was lost")
            return
        back_s = self._serve.health_period_s + self.copy_start_s
        self._note(
            "lose-router", f"the Router of {copy.name} ended with {len(copy.flights)} requests; back in {back_s:.0f} s"
        )
        self._fleet.stop_copy(copy)
        self._start(back_s)

    def roll(self) -> None:
        """All copies are replaced in place, a few at a time: each drains, then another loads where it was."""
        old = list(self._fleet.copies.values())
        at_once = self._serve.rollout_size(len(old))
        self._note(
            "rolling-update", f"{len(old)} {'copy is' if len(old) == 1 else 'copies are'} replaced, {at_once} at a time"
        )

        def replace_next() -> None:
            while old:
                copy = old.pop(0)
                if copy.name in self._fleet.copies:
                    self.drain(copy, lambda: self._start(self.copy_start_s, replace_next))
                    return

        for _ in range(at_once):
            replace_next()

    def add_copies(self, count: int, words: str) -> None:
        """On nodes that must come up first."""
        self._note("scale", words)
        for _ in range(count):
            self._start(self._node_s + self.copy_start_s)

    def remove_copies(self, count: int, words: str) -> None:
        """Those that load first, then the youngest; what leaves already is replaced for another reason."""
        self._note("scale", words)
        staying = [copy for copy in self._fleet.copies.values() if not copy.is_leaving]
        youngest = sorted(staying, key=lambda copy: (copy.is_open, -copy.number))
        for copy in youngest[:count]:
            self.drain(copy, lambda: None)

    def drain(self, copy: SimCopy, then: Callable[[], object]) -> None:
        """It takes no more, and leaves when it has nothing left, or after the time that a Router has for it."""
        copy.is_open, copy.is_leaving = False, True
        end_s = self._fleet.now_s + self._drain_s

        def look() -> None:
            if copy.name not in self._fleet.copies:
                return  # it was lost meanwhile, and is replaced for that
            if copy.flights and self._fleet.now_s < end_s:
                self._fleet.at(min(end_s, self._fleet.now_s + _DRAIN_LOOK_S), look)
                return
            self._fleet.stop_copy(copy)
            then()

        look()

    def _start(self, in_s: float, then: Callable[[], object] = lambda: None) -> None:
        copy = self._fleet.start_copy(is_open=False)

        def ready() -> None:
            if copy.name in self._fleet.copies and not copy.is_leaving:
                self._fleet.open_copy(copy)
            then()

        self._fleet.at(self._fleet.now_s + in_s, ready)

    def _ranks_back(self, copy: SimCopy) -> None:
        if copy.name in self._fleet.copies:
            self._fleet.ranks_are_back(copy)

    def _busiest(self, *, but_silent: bool = False) -> SimCopy | None:
        """Of those that take work: the loss that hurts most. `but_silent`: where one more would change nothing."""
        copies = [copy for copy in self._fleet.copies.values() if copy.is_open]
        if but_silent:
            copies = [copy for copy in copies if copy.silent_since_s is None]
        return max(copies, key=lambda copy: (len(copy.flights), -copy.number), default=None)

    def _note(self, kind: Kind, words: str) -> None:
        self.log.append(Happened(time_s=self._fleet.now_s, kind=kind, words=words))
