"""`strip("\\n")` on a stream of text."""

from __future__ import annotations


class NewlineTrimmer:
    """Drops leading newlines at once; trailing ones are held back until text follows."""

    def __init__(self) -> None:
        self.is_empty = True
        self._num_held = 0

    def push(self, text: str) -> str:
        """`text` with the newlines held before it, without those that may turn out to be the last."""
        if self.is_empty:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        if not body:
            self._num_held += len(text)
            return ""
        released = "\n" * self._num_held + body
        self._num_held = len(text) - len(body)
        self.is_empty = False
        return released
