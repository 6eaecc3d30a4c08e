"""What is told of each request at its end: one log line, and its span where requests are traced; never any of its
text.

Between hops 1 and 11. What a client noted in `metadata` is in the line, so that its own systems find the request again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from cluster.gateway.generation import Generation
from cluster.gateway.request_trace import PhaseTimes, RequestTrace
from cluster.gateway.requests import is_request_id
from cluster.tracing import TraceParent
from mull.v1 import generation_pb2 as pb
from workers.logs import log_fields

logger = logging.getLogger(__name__)


class RequestRecord:
    """What is told of one request."""

    def __init__(
        self,
        request: pb.GenerateRequest,
        tenant: str,
        *,
        parent: TraceParent | None = None,
        trace: RequestTrace | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`tenant` is empty where no keys are asked for. `parent`: the client's span that caused it, if it told one.

        `trace`: where requests are traced.
        """
        self._request = request
        self._tenant = tenant
        self._trace = trace
        self._context = parent if trace is None else trace.context
        self._clock = clock
        self._start_s = clock()
        self._first_token_s: float | None = None
        self._first_answer_s: float | None = None
        self._generations: Sequence[Generation] = ()
        self._num_held = self._num_held_answer = 0

    @property
    def trace_parent(self) -> str:
        """For what is done elsewhere for this request; empty where nobody traces it."""
        return "" if self._context is None else str(self._context)

    @property
    def awaits_first(self) -> bool:
        """Whether `on_tokens` has still something to learn: it need not be called for each message."""
        return self._first_answer_s is None

    def on_submitted(self, generations: Sequence[Generation]) -> None:
        """Its generations, which count their tokens themselves; what they have now is from an earlier call."""
        self._generations = tuple(generations)
        self._num_held_answer = self._num_answer
        self._num_held = self._num_thinking + self._num_answer

    def on_tokens(self) -> None:
        """New tokens have come."""
        passed_s = self._clock() - self._start_s
        if self._num_answer > self._num_held_answer:
            self._first_answer_s = passed_s
        if self._first_token_s is None and self._num_thinking + self._num_answer > self._num_held:
            self._first_token_s = passed_s

    def on_ended(self, code: str) -> None:
        """Tell all of it; `code` is the status that the client got, or would have got."""
        generations, request = self._generations, self._request
        total_s = self._clock() - self._start_s
        fields: dict[str, str | int | float | None] = {
            "request_id": request.request_id if is_request_id(request.request_id) else None,
            "tenant": self._tenant or None,
            "status": code,
            "finish": ",".join(_finish(generation) for generation in generations) or None,
            "prompt_tokens": generations[0].num_prompt_tokens if generations else 0,
            "cached_tokens": generations[0].cached_tokens if generations else 0,
            "thinking_tokens": self._num_thinking,
            "answer_tokens": self._num_answer,
            "time_to_first_token_s": _rounded(self._first_token_s),
            "time_to_first_answer_s": _rounded(self._first_answer_s),
            "total_s": _rounded(total_s),
        }
        if self._trace is not None:
            known = {name: value for name, value in fields.items() if value is not None}
            self._trace.end(code, known, self._phases(total_s))
        trace_id = None if self._context is None else f"{self._context.trace_id:032x}"
        # Of a request that was refused nothing is known to be short.
        notes = dict(request.metadata) if generations and request.metadata else None
        logger.info("request ended", extra=log_fields(**fields, trace_id=trace_id, metadata=notes))

    def _phases(self, end_s: float) -> PhaseTimes:
        has_thoughts = self._num_thinking > 0 and self._first_token_s is not None
        thinking_s = self._first_token_s if has_thoughts else None
        return PhaseTimes(thinking_s=thinking_s, answer_s=self._first_answer_s, end_s=end_s)

    @property
    def _num_thinking(self) -> int:
        return sum(generation.num_thinking_tokens for generation in self._generations)

    @property
    def _num_answer(self) -> int:
        return sum(generation.num_answer_tokens for generation in self._generations)


def _rounded(passed_s: float | None) -> float | None:
    return None if passed_s is None else round(passed_s, 4)


def _finish(generation: Generation) -> str:
    if generation.finished is None:
        return "none"
    return pb.Finished.Reason.Name(generation.finished.reason).removeprefix("REASON_").lower()
