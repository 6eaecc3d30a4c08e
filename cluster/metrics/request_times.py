"""How long requests wait, prefill, decode and stand still at a Router, from what it tells of them.

A request costs something at its beginning and its end; its tokens in between cost a look at whether anybody waits for
a first one. The clock is the caller's.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.registry import Collector

from cluster.metrics.plain import Histogram
from cluster.metrics.router import DECODE_TIME, PAUSES, PREFILL_TIME, QUEUE_TIME
from cluster.router.sequence import SequenceRequest, SequenceUpdate


@dataclass(slots=True)
class _Times:
    """Of one request, in seconds; None: not yet."""

    added_s: float
    admitted_s: float | None = None
    first_token_s: float | None = None
    lost_s: float | None = None
    """When its ranks took their last step, while it has had no token since."""


class RequestTimes(Collector):
    """Told by the step loop."""

    def __init__(self) -> None:
        self._live: dict[Hashable, _Times] = {}
        self._expectant: set[Hashable] = set()
        """Those whose next token says something."""
        self._queue = Histogram(QUEUE_TIME)
        self._prefill = Histogram(PREFILL_TIME)
        self._decode = Histogram(DECODE_TIME)
        self._pauses = Histogram(PAUSES, [("rank_lost",)])

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    def on_added(self, request: SequenceRequest, now_s: float) -> None:
        """A request was taken."""
        self._live[request.key] = _Times(now_s)
        self._expectant.add(request.key)

    def on_updates(self, updates: Sequence[SequenceUpdate], sent_s: float, now_s: float) -> None:
        """What a step had, which was sent at `sent_s`."""
        expectant = self._expectant
        for update in updates:
            if update.admitted_cached_tokens is not None:
                self._on_admitted(update.key, sent_s)
            if expectant and update.token_ids and update.key in expectant:
                self._on_token(update.key, now_s)
            if update.finish is not None:
                self.on_ended(update.key, now_s)

    def on_ended(self, key: Hashable, now_s: float) -> None:
        """A request has finished, or was cancelled or given up."""
        self._expectant.discard(key)
        times = self._live.pop(key, None)
        if times is not None and times.first_token_s is not None:
            self._decode.observe(now_s - times.first_token_s)

    def on_lost(self, last_step_s: float) -> None:
        """The ranks were lost: what they computed stands still."""
        for key, times in self._live.items():
            if times.admitted_s is not None and times.lost_s is None:
                times.lost_s = last_step_s
                self._expectant.add(key)

    def clear(self) -> None:
        """All requests have ended."""
        self._live.clear()
        self._expectant.clear()

    def collect(self) -> Iterator[Metric]:
        for metric in (self._queue, self._prefill, self._decode, self._pauses):
            yield from metric.collect()

    def _on_admitted(self, key: Hashable, sent_s: float) -> None:
        times = self._live.get(key)
        if times is not None:
            times.admitted_s = sent_s
            self._queue.observe(sent_s - times.added_s)

    def _on_token(self, key: Hashable, now_s: float) -> None:
        self._expectant.discard(key)
        times = self._live[key]
        if times.first_token_s is None:
            times.first_token_s = now_s
            if times.admitted_s is not None:
                self._prefill.observe(now_s - times.admitted_s)
        if times.lost_s is not None:
            self._pauses.observe(now_s - times.lost_s, "rank_lost")
            times.lost_s = None
