"""Ends an answer at the first of several texts, wherever tokens and deltas are cut.

Hop 11. The text that comes complete first ends the answer, the longer one where two end together: what is found
depends on the whole text alone, never on how it came. Text is held back only as long as it may be the start of one.
Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """The stop texts of one answer."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty."""
        self.found: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain to be before a stop; once one is `found`, all that was before it."""
        held, text = self._held, self._held + text
        match = min(filter(None, (self._match(text, stop, len(held)) for stop in self._stops)), default=None)
        if match is None:
            return self._release(text)
        end, length = match[0], -match[1]
        self.found, self._held = text[end - length : end], ""
        return text[: end - length]

    def pass_by(self, text: str) -> str:
        """As `push`, for text in which stops do not count yet; one that ends in later text does."""
        return self._release(self._held + text)

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held

    def _match(self, text: str, stop: str, num_passed: int) -> tuple[int, int] | None:
        """Where the first `stop` that ends in new text ends, and its length, negated: the smallest pair wins."""
        start = text.find(stop, max(0, num_passed - len(stop) + 1))
        return None if start < 0 else (start + len(stop), -len(stop))

    def _release(self, text: str) -> str:
        cut = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` goes on from."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
