"""Who waits, in the order in which they get their turn: higher priority first, then the earlier arrival.

Hop 5, a part of both schedulers. Knows nothing of what it holds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class WaitingQueue(Generic[Item]):
    """Items by key. Short (a scheduler bounds it), so that a sorted list is quick enough."""

    def __init__(self) -> None:
        self._order: list[tuple[int, int, Hashable]] = []
        """(-priority, arrival, key); arrivals differ, so that keys are never compared."""
        self._items: dict[Hashable, tuple[int, int, Item]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._items

    def __iter__(self) -> Iterator[Item]:
        """In their order."""
        return (self._items[key][2] for _, _, key in self._order)

    @property
    def head(self) -> Item:
        """Whose turn is next. Raises IndexError where nobody waits."""
        return self._items[self._order[0][2]][2]

    def add(self, key: Hashable, item: Item, *, priority: int, arrival: int) -> None:
        """`arrival` is unique; someone who comes back brings the one they had."""
        insort(self._order, (-priority, arrival, key))
        self._items[key] = (-priority, arrival, item)

    def replace(self, key: Hashable, item: Item) -> None:
        """In the same place. Raises KeyError where the key does not wait."""
        priority, arrival, _ = self._items[key]
        self._items[key] = (priority, arrival, item)

    def get(self, key: Hashable) -> Item | None:
        entry = self._items.get(key)
        return entry[2] if entry else None

    def pop(self) -> tuple[Hashable, Item]:
        """Take the head."""
        key = self._order.pop(0)[2]
        return key, self._items.pop(key)[2]

    def remove(self, key: Hashable) -> Item | None:
        """None where the key does not wait."""
        entry = self._items.pop(key, None)
        if entry is None:
            return None
        priority, arrival, item = entry
        del self._order[bisect_left(self._order, (priority, arrival), key=lambda place: place[:2])]
        return item
