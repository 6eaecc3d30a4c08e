"""Who waits, in the order of their places: the lower, the earlier.

Hop 5, a part of both schedulers. Knows nothing of what it holds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
Place = tuple[int, ...]


class WaitingQueue(Generic[Item]):
    """Items by key. Short (a scheduler bounds it), so that a sorted list is quick enough."""

    def __init__(self) -> None:
        self._order: list[tuple[Place, Hashable]] = []
        """Places differ, so that keys are never compared."""
        self._items: dict[Hashable, tuple[Place, Item]] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._items

    def __iter__(self) -> Iterator[Item]:
        """In their order."""
        return (self._items[key][1] for _, key in self._order)

    def add(self, key: Hashable, item: Item, *, place: Place) -> None:
        """Nobody else has that place."""
        insort(self._order, (place, key))
        self._items[key] = (place, item)

    def replace(self, key: Hashable, item: Item) -> None:
        """In the same place. Raises KeyError where the key does not wait."""
        place, _ = self._items[key]
        self._items[key] = (place, item)

    def get(self, key: Hashable) -> Item | None:
        entry = self._items.get(key)
        return entry[1] if entry else None

    def first(self, may_go: Callable[[Item], bool]) -> Item | None:
        """The first in order who may; None where nobody may."""
        return next(filter(may_go, self), None)

    @property
    def head(self) -> Item:
        """There is one."""
        _, key = self._order[0]
        return self._items[key][1]

    def pop(self) -> tuple[Hashable, Item]:
        """Take the head."""
        _, key = self._order.pop(0)
        return key, self._items.pop(key)[1]

    def remove(self, key: Hashable) -> Item | None:
        """None where the key does not wait."""
        entry = self._items.pop(key, None)
        if entry is None:
            return None
        place, item = entry
        del self._order[bisect_left(self._order, place, key=lambda entry: entry[0])]
        return item
