"""What it costs to bring tokens to their experts and results back: time and bytes, added up until somebody asks.

Hop 8. Sums over all layers of a step: a look at the clock and at a counter on each way, whatever a batch holds.
"""

from __future__ import annotations

import time
from typing import Any, Generic, TypeVar

from torch import Tensor

from workers.experts.dispatch import Dispatcher
from workers.experts.rows import RoutedRows
from workers.parallel import ParallelState

Handle = TypeVar("Handle")


class DispatchTraffic:
    """Of one rank."""

    def __init__(self, parallel: ParallelState) -> None:
        self._parallel = parallel
        self._seconds = 0.0
        self._num_bytes = 0

    def metered(self, dispatcher: Dispatcher[Any]) -> Dispatcher[Any]:
        """The same, counted; a rank alone sends nothing."""
        return MeteredDispatcher(dispatcher, self) if self._parallel.world_size > 1 else dispatcher

    @property
    def mark(self) -> tuple[float, int]:
        """To be given to `add` once something was sent."""
        return time.perf_counter(), self._parallel.num_sent_bytes

    def add(self, since: tuple[float, int]) -> None:
        """What was sent and how long it took, since then.

        On a GPU it is the time until the work was in its queue, and until uneven counts were known.
        """
        now_s, num_bytes = self.mark
        self._seconds += now_s - since[0]
        self._num_bytes += num_bytes - since[1]

    def take(self) -> tuple[float, int]:
        """Seconds and bytes since the last call."""
        taken = self._seconds, self._num_bytes
        self._seconds, self._num_bytes = 0.0, 0
        return taken


class MeteredDispatcher(Generic[Handle]):
    """A dispatcher that adds up its cost."""

    def __init__(self, inner: Dispatcher[Handle], traffic: DispatchTraffic) -> None:
        self._inner = inner
        self._traffic = traffic

    def dispatch(self, tokens: RoutedRows) -> tuple[RoutedRows, Handle]:
        mark = self._traffic.mark
        dispatched = self._inner.dispatch(tokens)
        self._traffic.add(mark)
        return dispatched

    def combine(self, partial_RH: Tensor, handle: Handle) -> Tensor:
        mark = self._traffic.mark
        combined = self._inner.combine(partial_RH, handle)
        self._traffic.add(mark)
        return combined
