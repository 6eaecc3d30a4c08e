"""What gateways know of the copies, and where they send a request: the product's own choice, and its delays.

A gateway hears every other second how busy a copy is; in between it knows only what it sent there itself. So several
gateways of a large fleet act on figures that are old, and alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache

from cluster.gateway.affinity import CHUNK_TOKENS, CopyLoad
from cluster.gateway.choice import Choice, Said
from cluster.planner.flights import Flight
from cluster.planner.sim_copy import SimCopy


class Door:
    """One gateway."""

    def __init__(self, max_streams: int | None, *, seed: int = 0) -> None:
        self.num_streams = 0
        self._max_streams = max_streams
        self._choice = Choice(seed)

    @property
    def is_full(self) -> bool:
        return self._max_streams is not None and self.num_streams >= self._max_streams

    def hear(self, said: Said) -> None:
        """How busy all copies are now."""
        self._choice.heard_all(said)

    def choose(self, num_tokens: int, prefix: tuple[int, ...], besides: Collection[str]) -> str | None:
        """The copy that the gateway takes; None where there is no other."""
        return self._choice.choose(num_tokens, prefix, besides)

    def sent(self, name: str, prefix: tuple[int, ...]) -> None:
        self.num_streams += 1
        self._choice.sent(name, prefix)

    def left(self, name: str) -> None:
        """A stream has ended there, or goes on elsewhere."""
        self.num_streams -= 1
        self._choice.left(name)

    def lost(self, name: str) -> None:
        """There is no such copy any more."""
        self._choice.lost(name)


class Doors:
    """All gateways; requests come to them in turn."""

    def __init__(self, num_gateways: int = 1, *, max_streams: int | None = None, shared_tokens: int = 0) -> None:
        """`max_streams`: of each; `shared_tokens`: with which all prompts of a tenant begin."""
        self.all = [Door(max_streams, seed=number) for number in range(num_gateways)]
        self._shared_chunks = shared_tokens // CHUNK_TOKENS

    def of(self, flight: Flight) -> Door:
        return self.all[flight.key % len(self.all)]

    def prefix(self, flight: Flight) -> tuple[int, ...]:
        """What gateways remember of its prompt."""
        return _prefix(flight.arrival.tenant, self._shared_chunks) if self._shared_chunks else ()

    def hear(self, copies: Iterable[SimCopy], *, part: int = 0, parts: int = 1) -> None:
        """Every so many-th of the gateways asks all copies."""
        said = said_by({copy.name: copy.load for copy in copies})
        for door in self.all[part::parts]:
            door.hear(said)

    def lost(self, name: str) -> None:
        for door in self.all:
            door.lost(name)


def said_by(loads: dict[str, CopyLoad]) -> Said:
    """What all copies say at once."""
    said = Said()
    for name, load in loads.items():
        said.tell(name, load)
    return said


@cache
def _prefix(tenant: str, num_chunks: int) -> tuple[int, ...]:
    return tuple(hash((tenant, chunk)) for chunk in range(num_chunks))
