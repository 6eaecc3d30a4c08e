"""Copies behind one front door in virtual time: arrivals are routed as gateways do it, the clock jumps between events.

Every request goes where `cluster.gateway.affinity` sends it, from what is known of the copies' load. A heap of times
says which copy is next; between them nothing happens. Deterministic: the same load gives the same figures.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from cluster.errors import NotReady, Overloaded, PromptTooLong
from cluster.gateway.affinity import CopyLoad, PrefixMemory, cheapest
from cluster.planner.flights import Flight
from cluster.planner.sim_copy import SimCopy
from cluster.planner.workload import Arrival


@dataclass(order=True)
class Happening:
    """Something that is done to the fleet at a time."""

    time_s: float
    do: Callable[[], object] = field(compare=False)


class Fleet:
    """`run` it once. Copies may come and go meanwhile, by happenings."""

    def __init__(self, make_copy: Callable[[str, Callable[[Flight], object]], SimCopy], num_copies: int) -> None:
        """`make_copy`: from its name, and what is to be called with each flight that is over."""
        self.now_s = 0.0
        self.flights: list[Flight] = []
        self.copies: dict[str, SimCopy] = {}
        self.gone: list[SimCopy] = []
        """Copies that were stopped."""
        self._make_copy = make_copy
        self._num_made = 0
        self._num_open_flights = 0
        self._is_stopped = False
        self._memories: dict[str, PrefixMemory] = {}
        self._heap: list[tuple[float, int, SimCopy]] = []
        self._tickets: dict[str, int] = {}
        """The only valid entry of each copy in the heap."""
        self._num_tickets = 0
        self._happenings: list[Happening] = []
        self._parked: list[tuple[Flight, list[int]]] = []
        """Have no copy that takes them."""
        for _ in range(num_copies):
            self.start_copy()

    def start_copy(self) -> SimCopy:
        name = f"copy-{self._num_made + 1}"
        self._num_made += 1
        copy = self.copies[name] = self._make_copy(name, self._on_end)
        self._memories[name] = PrefixMemory()
        self._unpark()
        return copy

    def stop_copy(self, copy: SimCopy) -> None:
        """It leaves, and its flights go on elsewhere behind their output."""
        leaving = copy.give_back(self.now_s)
        del self.copies[copy.name]
        self._tickets.pop(copy.name, None)
        self.gone.append(copy)
        for flight, output_ids in leaving:
            flight.num_moves += 1
            self._place(flight, output_ids)

    def at(self, time_s: float, do: Callable[[], object]) -> None:
        """Let something happen."""
        heapq.heappush(self._happenings, Happening(time_s, do))

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
    def num_waiting(self) -> int:
        return len(self._parked) + sum(copy.num_waiting for copy in self.copies.values())

    @property
    def num_running(self) -> int:
        return sum(copy.num_running for copy in self.copies.values())

    def run(self, arrivals: Iterable[Arrival], *, until_s: float | None = None) -> None:
        """Until all that came is over, or until a time."""
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
        self._place(flight, [])

    def _place(self, flight: Flight, output_ids: list[int]) -> None:
        """At the copy where it costs least; parked where none takes work; refused where none takes more."""
        num_prompt = flight.arrival.prompt_tokens
        choices = {name: copy for name, copy in self.copies.items() if copy.is_open}
        is_full = False
        while choices:
            name = next(iter(choices)) if len(choices) == 1 else self._cheapest(num_prompt, choices)
            copy = choices.pop(name)
            try:
                copy.add(flight, self.now_s, output_ids)
            except (Overloaded, PromptTooLong):
                is_full = True
                continue
            except NotReady:
                continue
            finally:
                self.reschedule(copy)
            return
        if is_full and not output_ids:
            flight.was_refused = True
            self._num_open_flights -= 1
        else:
            self._parked.append((flight, output_ids))

    def _cheapest(self, num_prompt: int, choices: dict[str, SimCopy]) -> str:
        loads = {
            name: (self._memories[name], CopyLoad(num_running=copy.num_running, num_waiting=copy.num_waiting))
            for name, copy in choices.items()
        }
        name = cheapest(num_prompt, (), loads)
        assert name is not None, "there are copies"
        return name

    def _unpark(self) -> None:
        parked, self._parked = self._parked, []
        for flight, output_ids in parked:
            self._place(flight, output_ids)

    def ranks_are_back(self, copy: SimCopy) -> None:
        """A copy takes work again."""
        copy.start_ranks(self.now_s)
        self.reschedule(copy)
        self._unpark()

    def _on_end(self, _flight: Flight) -> None:
        self._num_open_flights -= 1
        if self._parked:
            self._unpark()
