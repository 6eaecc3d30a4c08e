"""Which copy a sequence goes to: of a few that chance names, and of those that know its prompt, the cheapest.

Hop 3, pure. A gateway hears every other second how busy a copy is, and counts what it sends there itself. Of other
gateways it knows nothing in between: if all took the copy that was the least busy then, they would all take the same
one, hundreds of requests before it says so. So the more of the load is others', the fewer copies are looked at: two, at
the least, since the better of two draws spreads nearly as well as the best of all would with figures of now
(Mitzenmacher, "How useful is old information?", 2000). A gateway that is alone looks at all.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence

from cluster.gateway.affinity import CopyLoad, PrefixMemory, cost_tokens, known_load

LEAST_LOOKED_AT = 2
"""Copies."""


class Said:
    """How busy the copies are that take work, as they said last."""

    def __init__(self) -> None:
        self.loads: dict[str, CopyLoad] = {}
        self.num_sequences = 0
        """At all of them."""

    def tell(self, name: str, load: CopyLoad | None) -> None:
        """None: it takes no work."""
        before = self.loads.pop(name, None) if load is None else self.loads.get(name)
        if before is not None:
            self.num_sequences -= before.num_running + before.num_waiting
        if load is not None:
            self.num_sequences += load.num_running + load.num_waiting
            self.loads[name] = load


class Choice:
    """One gateway's."""

    def __init__(self, seed: int | None = None) -> None:
        """With a seed it chooses the same every time."""
        self._draw = random.Random(seed)
        self._said = Said()
        self._own: Counter[str] = Counter()
        """Sequences that are there through this gateway."""
        self._sent: Counter[str] = Counter()
        """Of those, how many more than when the copy said how busy it is."""
        self._num_own = 0
        self._num_sent = 0
        """Both at the copies that take work, as what they said is: some hold on to old work for long."""
        self._memories: dict[str, PrefixMemory] = {}

    def heard(self, name: str, load: CopyLoad | None) -> None:
        """A copy said how busy it is; None: it takes no work."""
        self._add_to_totals(name, -1)
        self._said.tell(name, load)
        self._sent.pop(name, None)
        self._add_to_totals(name, 1)

    def heard_all(self, said: Said) -> None:
        """All said so at once: for the planner, whose gateways share what they heard."""
        self._said = said
        self._sent.clear()
        self._num_sent = 0
        self._num_own = sum(count for name, count in self._own.items() if name in said.loads)

    def sent(self, name: str, prefix: Sequence[int]) -> None:
        """A sequence went there; its prompt begins with these chunks."""
        self._count(name, 1)
        if prefix:
            self._memories.setdefault(name, PrefixMemory()).remember(prefix)

    def left(self, name: str) -> None:
        """One that went there is there no longer."""
        self._count(name, -1)

    def lost(self, name: str) -> None:
        """The copy is out of reach, with all that was sent there, and with its caches."""
        self._add_to_totals(name, -1)
        self._said.tell(name, None)
        self._own.pop(name, None)
        self._sent.pop(name, None)
        self._memories.pop(name, None)

    def load(self, name: str) -> CopyLoad:
        """Of a copy that takes work, as far as is known here."""
        return known_load(self._said.loads[name], self._own[name], self._sent[name])

    def choose(self, num_tokens: int, prefix: Sequence[int], besides: Collection[str] = ()) -> str | None:
        """Where a sequence of so many tokens costs least; None where no other copy takes work."""
        loads = self._said.loads
        names = [name for name in loads if name not in besides] if besides else list(loads)
        if not names:
            return None
        most = self._num_looked_at()
        found = self._some(names, most)
        if prefix and self._memories:
            first = prefix[0]
            known = [name for name, memory in self._memories.items() if first in memory and name in loads]
            found += self._some([name for name in known if name not in besides], most)
        if len(found) == 1:
            return found[0]
        # Chance decides among equals, or gateways would take the same one.
        costs = {
            name: (cost_tokens(num_tokens, self._num_cached(name, prefix), self.load(name)), self._draw.random())
            for name in found
        }
        return min(costs, key=costs.__getitem__)

    def _count(self, name: str, more: int) -> None:
        self._own[name] += more
        self._sent[name] += more
        if name in self._said.loads:
            self._num_own += more
            self._num_sent += more

    def _add_to_totals(self, name: str, sign: int) -> None:
        if name in self._said.loads:
            self._num_own += sign * self._own[name]
            self._num_sent += sign * self._sent[name]

    def _num_looked_at(self) -> int | None:
        """None: all. By the share of the load that is others': of two gateways each looks at four, of many at two."""
        others = self._said.num_sequences - (self._num_own - self._num_sent)
        if others <= 0 and self._num_own:
            return None
        return int(LEAST_LOOKED_AT * (1 + self._num_own / max(1, others)))

    def _some(self, names: list[str], most: int | None) -> list[str]:
        """So many of them by chance; None: all."""
        return names if most is None or most >= len(names) else self._draw.sample(names, most)

    def _num_cached(self, name: str, prefix: Sequence[int]) -> int:
        memory = self._memories.get(name) if prefix else None
        return 0 if memory is None else memory.num_cached(prefix)
