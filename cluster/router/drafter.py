"""Guesses what a sequence says next, from what it said before: thoughts repeat themselves.

The suffix lookup of speculative decoding without a draft model: after the last few tokens comes what came after them
the last time (prompt lookup decoding; Saxena, 2023). A guess costs one row of a step and changes no token: ranks keep
it only where it is what they sample themselves. Every token that comes tells how well it would have been guessed,
whether it was or not, so that guessing stops where it does not pay, and starts again where it does. Pure integers.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import log

SUFFIX = 3
"""Tokens that must have come in this order before."""
MAX_SUFFIXES = 1 << 13
"""Of the latest tokens: what a sequence may keep."""
RATE = 0.1
"""Weight of the newest token in the share of good guesses."""
FIRST_RATE = 0.5
"""That share before the first guess."""


class Drafter:
    """Follows one sequence, token by token."""

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        """`token_ids`: what the sequence begins with."""
        self.hit_rate = FIRST_RATE
        """Share of tokens that were guessed right, of late, where there was a guess."""
        self._token_ids: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        """Where the token stood that followed these ones last."""
        self.extend(token_ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Tokens that nobody had to guess."""
        for token_id in token_ids:
            self._append(token_id)

    def push(self, token_id: int) -> None:
        """The next token of the sequence."""
        if (place := self._place()) is not None:
            self.hit_rate += RATE * ((self._token_ids[place] == token_id) - self.hit_rate)
        self._append(token_id)

    def draft(self, most: int, least_chance: float) -> list[int]:
        """What comes next, at most so many tokens, each right with at least that chance."""
        place = self._place()
        if place is None or self.hit_rate < least_chance:
            return []
        # Each is right only where those before it are.
        likely = most if self.hit_rate >= 1 else int(log(least_chance) / log(self.hit_rate))
        draft = self._token_ids[place : place + min(most, likely)]
        # What repeats itself so fast that the draft reaches the end of the text goes on repeating itself.
        while len(draft) < min(most, likely):
            draft += draft[: min(most, likely) - len(draft)]
        return draft

    def _place(self) -> int | None:
        return self._followers.get(tuple(self._token_ids[-SUFFIX:]))

    def _append(self, token_id: int) -> None:
        if len(self._token_ids) >= SUFFIX:
            suffix = tuple(self._token_ids[-SUFFIX:])
            self._followers.pop(suffix, None)  # the latest stand last
            self._followers[suffix] = len(self._token_ids)
            if len(self._followers) > MAX_SUFFIXES:
                del self._followers[next(iter(self._followers))]
        self._token_ids.append(token_id)
