"""When each token came: the clock of one run, inside the engine's process."""

from __future__ import annotations

import time
from collections.abc import Sequence


class OverTime(Exception):
    """The run has taken longer than its bound."""


class Recorder:
    """The clock starts in the constructor: prompts are there, nothing is submitted yet."""

    def __init__(self, num_streams: int, bound_s: float) -> None:
        self.times_s: list[list[float]] = [[] for _ in range(num_streams)]
        self.tokens: list[list[int]] = [[] for _ in range(num_streams)]
        self._bound_s = bound_s
        self._started_s = time.perf_counter()

    @property
    def left_s(self) -> float:
        return self._bound_s - (time.perf_counter() - self._started_s)

    def add(self, stream: int, token_ids: Sequence[int]) -> None:
        """Tokens of a stream that came now. Raises OverTime."""
        now_s = round(time.perf_counter() - self._started_s, 6)
        self.times_s[stream] += [now_s] * len(token_ids)
        self.tokens[stream] += token_ids
        if now_s > self._bound_s:
            raise OverTime
