"""What gateways know of the copies, and where they send a request: the product's rule, and its delays.

A gateway hears every other second how busy a copy is; in between it knows only what it sent there itself. So several
gateways of a large fleet act on figures that are old, and alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cache

from cluster.gateway.affinity import CHUNK_TOKENS, CopyLoad, PrefixMemory, cheapest, known_load
from cluster.planner.flights import Flight
from cluster.planner.sim_copy import SimCopy


class Door:
    """One gateway."""

    def __init__(self, max_streams: int | None) -> None:
        self.num_streams = 0
        self._max_streams = max_streams
        self._sent: Counter[str] = Counter()
        """Streams of its own, by copy."""
        self._said: Mapping[str, CopyLoad] = {}
        self._memories: dict[str, PrefixMemory] = {}
        self._known: dict[str, tuple[PrefixMemory, CopyLoad]] = {}

    @property
    def is_full(self) -> bool:
        return self._max_streams is not None and self.num_streams >= self._max_streams

    def hear(self, said: Mapping[str, CopyLoad]) -> None:
        """How busy all copies are now."""
        self._said = said
        self._known = {name: (_NO_MEMORY, load) for name, load in said.items()}
        for name in (self._sent.keys() | self._memories.keys()) & said.keys():
            self._know(name)

    def choose(self, num_tokens: int, prefix: tuple[int, ...], besides: Collection[str]) -> str | None:
        """The copy where it costs least; None where there is no other."""
        known = self._known
        if besides:
            known = {name: what for name, what in known.items() if name not in besides}
        return cheapest(num_tokens, prefix, known)

    def sent(self, name: str, prefix: tuple[int, ...]) -> None:
        self._sent[name] += 1
        self.num_streams += 1
        if prefix:
            self._memories.setdefault(name, PrefixMemory()).remember(prefix)
        self._know(name)

    def left(self, name: str) -> None:
        """A stream has ended there, or goes on elsewhere."""
        self._sent[name] -= 1
        self.num_streams -= 1
        if name in self._said:
            self._know(name)

    def lost(self, name: str) -> None:
        """There is no such copy any more."""
        self._memories.pop(name, None)
        self._known.pop(name, None)

    def _know(self, name: str) -> None:
        load = known_load(self._said.get(name, _IDLE), self._sent[name])
        self._known[name] = self._memories.get(name, _NO_MEMORY), load


class Doors:
    """All gateways; requests come to them in turn."""

    def __init__(self, num_gateways: int = 1, *, max_streams: int | None = None, shared_tokens: int = 0) -> None:
        """`max_streams`: of each; `shared_tokens`: with which all prompts of a tenant begin."""
        self.all = [Door(max_streams) for _ in range(num_gateways)]
        self._shared_chunks = shared_tokens // CHUNK_TOKENS

    def of(self, flight: Flight) -> Door:
        return self.all[flight.key % len(self.all)]

    def prefix(self, flight: Flight) -> tuple[int, ...]:
        """What gateways remember of its prompt."""
        return _prefix(flight.arrival.tenant, self._shared_chunks) if self._shared_chunks else ()

    def hear(self, copies: Iterable[SimCopy], *, part: int = 0, parts: int = 1) -> None:
        """Every so many-th of the gateways asks all copies."""
        said = {copy.name: copy.load for copy in copies}
        for door in self.all[part::parts]:
            door.hear(said)

    def lost(self, name: str) -> None:
        for door in self.all:
            door.lost(name)


_NO_MEMORY = PrefixMemory()
_IDLE = CopyLoad()


@cache
def _prefix(tenant: str, num_chunks: int) -> tuple[int, ...]:
    return tuple(hash((tenant, chunk)) for chunk in range(num_chunks))
