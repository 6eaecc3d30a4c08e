"""Draws names for tool arguments: from the lists, or any word, so that copying is learnt and not the list by heart."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from pocket_training.words import make_word


@dataclass(frozen=True)
class Names:
    """A source of names; `made_up` is the share that is on no list."""

    rng: Random
    made_up: float

    def pick(self, values: tuple[str, ...]) -> str:
        """One of `values`, or any other word, written as they are."""
        listed = self.rng.choice(values)
        if self.rng.random() >= self.made_up:
            return listed
        word = make_word(self.rng)
        return word.capitalize() if listed[0].isupper() else word

    def two(self, values: tuple[str, ...]) -> tuple[str, str]:
        """Two different names."""
        first = second = self.pick(values)
        while first == second:
            second = self.pick(values)
        return first, second
