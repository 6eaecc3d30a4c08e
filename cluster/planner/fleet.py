"""Copies behind one front door in virtual time: arrivals are routed as gateways do it, the clock jumps between events.

Every request goes where its gateway sends it (`doors`), from what is known there of the copies' load. A heap of times
says which copy is next; between them nothing happens. Deterministic: the same load gives the same figures.
"""

from __future__ import annotations

import gc
import heapq
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.errors import NotReady, Overloaded, PromptTooLong
from cluster.planner.doors import Doors, said_by
from cluster.planner.flights import Flight
from cluster.planner.sim_copy import SimCopy
from cluster.planner.workload import Arrival

_POLLS = 8
"""Gateways do not ask all at once, but in so many parts."""


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without looks for cycles among a million live objects, which cost a fifth of the time: requests are in none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(order=True)
class Happening:
    """Something that is done to the fleet at a time; at the same time, in the order in which it was arranged."""

    time_s: float
    number: int
    do: Callable[[], object] = field(compare=False)


class Fleet:
    """`run` it once. Copies may come and go meanwhile, by happenings."""

    def __init__(
        self,
        make_copy: Callable[[int, Callable[[Flight], object]], SimCopy],
        num_copies: int,
        *,
        doors: Doors | None = None,
        poll_s: float | None = None,
        patience_s: float | None = None,
    ) -> None:
        """`make_copy`: from its number, and what is to be called with each flight that is over.

        `poll_s`: how often gateways ask copies how busy they are; None: they know it always. `patience_s`: how long a
        new request waits where no copy takes work; None: for ever.
        """
        self.now_s = 0.0
        self.flights: list[Flight] = []
        self.copies: dict[str, SimCopy] = {}
        self.gone: list[SimCopy] = []
        """Copies that were stopped."""
        self.num_moved_total = 0
        """Requests that went on at another copy, or wait for one."""
        self.doors = doors or Doors()
        self._make_copy = make_copy
        self._poll_s, self._patience_s = poll_s, patience_s
        self._num_made = 0
        self._num_open_flights = 0
        self._is_stopped = False
        self._heap: list[tuple[float, int, SimCopy]] = []
        self._tickets: dict[str, int] = {}
        """The only valid entry of each copy in the heap."""
        self._num_tickets = 0
        self._happenings: list[Happening] = []
        self._num_happenings = 0
        self._parked: dict[int, tuple[Flight, list[int]]] = {}
        """Have no copy that takes them. By key: the oldest first."""
        for _ in range(num_copies):
            self.start_copy()
        self.doors.hear(self._open_copies())
        if poll_s is not None:
            parts = min(_POLLS, len(self.doors.all))
            for part in range(parts):
                self._poll(part, parts, poll_s * (1 + part / parts))

    def start_copy(self, *, is_open: bool = True) -> SimCopy:
        """One that is not open yet loads: `open_copy` it."""
        self._num_made += 1
        copy = self._make_copy(self._num_made, self._on_end)
        self.copies[copy.name] = copy
        copy.is_open = is_open
        if is_open:
            self.open_copy(copy)
        return copy

    def open_copy(self, copy: SimCopy) -> None:
        """It takes work from now on. Gateways hear of it at once where something waits for that."""
        copy.is_open = True
        if self._parked:
            self.doors.hear(self._open_copies())
            self._unpark()

    def stop_copy(self, copy: SimCopy) -> None:
        """It leaves, and its flights go on elsewhere behind their output."""
        leaving = copy.give_back(self.now_s)
        del self.copies[copy.name]
        self._tickets.pop(copy.name, None)
        self.gone.append(copy)
        for flight, _ in leaving:
            self.doors.of(flight).left(copy.name)
        self.doors.lost(copy.name)
        for flight, output_ids in leaving:
            flight.num_moves += 1
            self.num_moved_total += 1
            flight.pause(self.now_s)
            self._place(flight, output_ids)

    def lose_ranks(self, copy: SimCopy) -> None:
        """Its requests wait for `ranks_are_back`."""
        copy.lose_ranks(self.now_s)
        self.reschedule(copy)

    def silence(self, copy: SimCopy) -> None:
        """A rank of it answers no longer: its requests wait for `lose_ranks`, and more come."""
        copy.fall_silent(self.now_s)
        self.reschedule(copy)

    def at(self, time_s: float, do: Callable[[], object]) -> None:
        """Let something happen."""
        self._num_happenings += 1
        heapq.heappush(self._happenings, Happening(time_s, self._num_happenings, do))

    def reschedule(self, copy: SimCopy) -> None:
        """Its `next_s` has changed."""
        self._num_tickets += 1
        self._tickets[copy.name] = self._num_tickets
        if copy.next_s is not None:
            heapq.heappush(self._heap, (copy.next_s, self._num_tickets, copy))

    def catch_up(self) -> None:
        """Let figures of all copies be of now."""
        for copy in self.copies.values():
            copy.catch_up(self.now_s)
            self.reschedule(copy)

    def stop(self) -> None:
        """Let `run` end here."""
        self._is_stopped = True

    @property
    def num_parked(self) -> int:
        """Requests that no copy has."""
        return len(self._parked)

    @property
    def num_waiting(self) -> int:
        return self.num_parked + sum(copy.num_waiting for copy in self.copies.values())

    @property
    def num_running(self) -> int:
        return sum(copy.num_running for copy in self.copies.values())

    def run(self, arrivals: Iterable[Arrival], *, until_s: float | None = None) -> None:
        """Until all that came is over, or until a time."""
        with _uncollected():
            self._run(arrivals, until_s)

    def _run(self, arrivals: Iterable[Arrival], until_s: float | None) -> None:
        coming: Iterator[Arrival] = iter(arrivals)
        arrival = next(coming, None)
        while not self._is_stopped:
            copy_s = self._next_copy_s()
            event_s = self._happenings[0].time_s if self._happenings else None
            arrival_s = arrival.time_s if arrival is not None else None
            times = [time_s for time_s in (copy_s, event_s, arrival_s) if time_s is not None]
            if not times or (until_s is not None and min(times) > until_s):
                break
            if arrival is None and not self._num_open_flights:
                break  # what else would happen concerns nobody
            self.now_s = min(times)
            # At the same time: results first, so that what they free can be had.
            if copy_s == self.now_s:
                _, _, copy = heapq.heappop(self._heap)
                copy.advance()
                self.reschedule(copy)
            elif event_s == self.now_s:
                heapq.heappop(self._happenings).do()
            else:
                assert arrival is not None, "its time is the least"
                self._arrive(arrival)
                arrival = next(coming, None)

    def _next_copy_s(self) -> float | None:
        while self._heap:
            time_s, ticket, copy = self._heap[0]
            if self._tickets.get(copy.name) == ticket:
                return time_s
            heapq.heappop(self._heap)
        return None

    def _arrive(self, arrival: Arrival) -> None:
        flight = Flight(len(self.flights), arrival)
        self.flights.append(flight)
        self._num_open_flights += 1
        if self.doors.of(flight).is_full:
            self._refuse(flight)
        else:
            self._place(flight, [])

    def _place(self, flight: Flight, output_ids: list[int]) -> None:
        """At the copy where it costs least; parked where none takes work; refused where none takes more."""
        door, prefix = self.doors.of(flight), self.doors.prefix(flight)
        if self._poll_s is None:
            door.hear(said_by({copy.name: copy.load for copy in self._open_copies()}))
        refused_by: set[str] = set()
        is_full = False
        num_tokens = flight.arrival.prompt_tokens + len(output_ids)
        while (name := door.choose(num_tokens, prefix, refused_by)) is not None:
            refused_by.add(name)
            copy = self.copies.get(name)
            if copy is None or not copy.is_open:
                continue
            refusal = self._offer(copy, flight, output_ids)
            if refusal is None:
                door.sent(name, prefix)
                return
            is_full = is_full or not isinstance(refusal, NotReady)
        if is_full and not output_ids:
            self._refuse(flight)
        else:
            self._park(flight, output_ids)

    def _offer(self, copy: SimCopy, flight: Flight, output_ids: list[int]) -> Exception | None:
        """Why it does not take the request; None: it does."""
        try:
            copy.add(flight, self.now_s, output_ids)
        except (Overloaded, PromptTooLong, NotReady) as error:
            return error
        finally:
            self.reschedule(copy)
        return None

    def _refuse(self, flight: Flight) -> None:
        flight.was_refused = True
        self._num_open_flights -= 1

    def _park(self, flight: Flight, output_ids: list[int]) -> None:
        """Nobody has it: a gateway keeps what has begun, a client tries again with what has not."""
        self._parked[flight.key] = flight, output_ids
        if self._patience_s is not None and not output_ids:
            gives_up_s = flight.arrival.time_s + self._patience_s
            self.at(max(self.now_s, gives_up_s), lambda: self._give_up(flight))

    def _give_up(self, flight: Flight) -> None:
        if self._parked.pop(flight.key, None) is not None:
            self._refuse(flight)

    def _open_copies(self) -> Iterator[SimCopy]:
        return (copy for copy in self.copies.values() if copy.is_open)

    def _poll(self, part: int, parts: int, at_s: float) -> None:
        """Some of the gateways ask, again and again."""

        def ask() -> None:
            self.doors.hear(self._open_copies(), part=part, parts=parts)
            assert self._poll_s is not None, "they know it always"
            self._poll(part, parts, self.now_s + self._poll_s)

        self.at(at_s, ask)

    def _unpark(self) -> None:
        parked, self._parked = self._parked, {}
        for flight, output_ids in parked.values():
            self._place(flight, output_ids)

    def ranks_are_back(self, copy: SimCopy) -> None:
        """A copy takes work again, unless it drains."""
        copy.start_ranks(self.now_s)
        self.reschedule(copy)
        if copy.is_open:
            self.open_copy(copy)

    def _on_end(self, flight: Flight) -> None:
        self._num_open_flights -= 1
        self.doors.of(flight).left(flight.copy)
        if self._parked:
            self._unpark()
