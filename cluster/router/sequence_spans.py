"""SequenceSpans: each request at this Router as a span, with its time in the queue and its prefill as parts.

What happens to it between is an event of the span: its first token, a preemption, a loss of ranks and its first token
behind one. There is no span for a token or a step.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.router.sequence import SequenceRequest, SequenceUpdate
from cluster.tracing import TraceParent

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from cluster.spans import Tracing


@dataclass(slots=True)
class _Live:
    span: Span
    zero_ns: int
    """Of the monotonic clock, when it came: the clocks may drift apart later."""
    added_s: float
    admitted_s: float | None = None
    has_token: bool = False
    num_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    is_replaying: bool = False

    def at(self, time_s: float) -> int:
        return self.zero_ns + int(time_s * 1e9)


class SequenceSpans:
    """A RequestWatch."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._live: dict[Hashable, _Live] = {}

    def on_added(self, request: SequenceRequest, now_s: float) -> None:
        about: dict[str, str | int] = {
            "mull.request_id": request.request_id,
            "mull.prompt_tokens": len(request.prompt_ids),
            "mull.held_tokens": len(request.output_ids),
            "mull.priority": request.priority,
        }
        zero_ns = time.time_ns() - time.monotonic_ns()
        begun_ns = zero_ns + int(now_s * 1e9)
        span = self._tracing.begin("sequence", TraceParent.parse(request.trace_parent), begun_ns, about)
        if span.is_recording():
            self._live[request.key] = _Live(span, zero_ns, now_s)

    def on_updates(self, updates: Sequence[SequenceUpdate], sent_s: float, now_s: float) -> None:
        # What a step sampled and what it put in the model's mouth are two updates; one without tokens is no step.
        for key in {update.key for update in updates if update.token_ids} & self._live.keys():
            self._live[key].num_steps += 1
        for update in updates:
            live = self._live.get(update.key)
            if live is None:
                continue
            live.num_tokens += len(update.token_ids)
            if update.admitted_cached_tokens is not None:
                self._admit(live, update.admitted_cached_tokens, sent_s)
            if update.num_preemptions != live.num_preemptions:
                live.num_preemptions = update.num_preemptions
                self._tell(live, "computed again after a preemption", now_s)
            if update.token_ids and (live.is_replaying or not live.has_token):
                self._tell_token(live, now_s)
            if update.finish is not None:
                self._end(update.key, update.finish.value, now_s)

    def on_ended(self, key: Hashable, now_s: float) -> None:
        self._end(key, "cancelled", now_s)

    def on_lost(self, last_step_s: float) -> None:
        for live in self._live.values():
            live.is_replaying = live.admitted_s is not None
            self._tell(live, "ranks lost", max(last_step_s, live.added_s))

    def clear(self) -> None:
        now_s = time.monotonic()
        for key in list(self._live):
            self._end(key, "router ended", now_s)

    def _admit(self, live: _Live, cached_tokens: int, sent_s: float) -> None:
        live.admitted_s = sent_s
        live.span.set_attribute("mull.cached_tokens", cached_tokens)
        self._tracing.add_part(live.span, "queue", live.at(live.added_s), live.at(sent_s), {})

    def _tell_token(self, live: _Live, now_s: float) -> None:
        if live.is_replaying:
            self._tell(live, "first token behind the loss", now_s)
        elif live.admitted_s is not None:
            self._tracing.add_part(live.span, "prefill", live.at(live.admitted_s), live.at(now_s), {})
            self._tell(live, "first token", now_s)
        live.is_replaying, live.has_token = False, True

    def _tell(self, live: _Live, what: str, now_s: float) -> None:
        live.span.add_event(what, {"mull.tokens": live.num_tokens}, live.at(now_s))

    def _end(self, key: Hashable, finish: str, now_s: float) -> None:
        live = self._live.pop(key, None)
        if live is None:
            return
        live.span.set_attributes(
            {
                "mull.finish": finish,
                "mull.tokens": live.num_tokens,
                "mull.steps": live.num_steps,
                "mull.preemptions": live.num_preemptions,
            }
        )
        live.span.end(live.at(now_s))
