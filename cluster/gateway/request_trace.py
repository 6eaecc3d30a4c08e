"""RequestTrace: a request as a span, its thoughts and its answer as parts of it; never any of its text.

Between hops 1 and 11. Queue and prefill are parts of the Router's span below this one: only it knows them. Names of
attributes are those of the request's log line, and OpenTelemetry's for generative AI where it has them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.tracing import TraceParent

if TYPE_CHECKING:
    from cluster.spans import Tracing

_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Status codes that a server's span counts as errors; the others are the client's business."""


@dataclass(frozen=True, kw_only=True)
class PhaseTimes:
    """When a request's phases began, in seconds since its start; None: it had none."""

    thinking_s: float | None
    answer_s: float | None
    end_s: float


class RequestTrace:
    """The span of one request, from its arrival to its end."""

    def __init__(self, tracing: Tracing, parent: TraceParent | None, model: str) -> None:
        from cluster.spans import parent_of

        self._tracing = tracing
        self._start_ns = time.time_ns()
        about = {"gen_ai.operation.name": "chat", "gen_ai.request.model": model}
        self._span = tracing.begin("generate", parent, self._start_ns, about)
        self.context = parent_of(self._span)
        """What is done elsewhere for the request is below it."""

    def end(self, status: str, fields: Mapping[str, str | int | float], times: PhaseTimes) -> None:
        """All that is known of it by now."""
        from opentelemetry.trace import StatusCode

        if self._span.is_recording():
            self._add_parts(times)
            self._span.set_attributes({f"mull.{name}": value for name, value in fields.items()})
        if status in _FAULTS:
            self._span.set_status(StatusCode.ERROR, status)
        self._span.end(self._at(times.end_s))

    def _add_parts(self, times: PhaseTimes) -> None:
        ends_s = times.end_s if times.answer_s is None else times.answer_s
        if times.thinking_s is not None:
            self._tracing.add_part(self._span, "thinking", self._at(times.thinking_s), self._at(ends_s), {})
        if times.answer_s is not None:
            self._tracing.add_part(self._span, "answer", self._at(times.answer_s), self._at(times.end_s), {})

    def _at(self, passed_s: float) -> int:
        return self._start_ns + int(passed_s * 1e9)
