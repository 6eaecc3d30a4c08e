"""One log line for each request, at its end: who it was, how it ended, how long and how many tokens; never any of its
text.

Between hops 1 and 11. What a client noted in `metadata` is in it, so that its own systems find the request again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from cluster.gateway.generation import Generation
from cluster.gateway.requests import is_request_id
from mull.v1 import generation_pb2 as pb
from workers.logs import log_fields

logger = logging.getLogger(__name__)


class RequestRecord:
    """What is told of one request."""

    def __init__(
        self, request: pb.GenerateRequest, tenant: str, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`tenant` is empty where no keys are asked for."""
        self.first_token_s: float | None = None
        """Since the start, as all that follow."""
        self.first_answer_s: float | None = None
        self._request = request
        self._tenant = tenant
        self._clock = clock
        self._start_s = clock()
        self._generations: Sequence[Generation] = ()
        self._num_held = self._num_held_answer = 0

    @property
    def awaits_first(self) -> bool:
        """Whether `on_tokens` has still something to learn: it need not be called for each message."""
        return self.first_answer_s is None

    def on_submitted(self, generations: Sequence[Generation]) -> None:
        """Its generations, which count their tokens themselves; what they have now is from an earlier call."""
        self._generations = tuple(generations)
        self._num_held_answer = self._num_answer
        self._num_held = self._num_thinking + self._num_answer

    def on_tokens(self) -> None:
        """New tokens have come."""
        passed_s = self._clock() - self._start_s
        if self._num_answer > self._num_held_answer:
            self.first_answer_s = passed_s
        if self.first_token_s is None and self._num_thinking + self._num_answer > self._num_held:
            self.first_token_s = passed_s

    def on_ended(self, code: str) -> None:
        """Write the line; `code` is the status that the client got, or would have got."""
        generations, request = self._generations, self._request
        logger.info(
            "request ended",
            extra=log_fields(
                request_id=request.request_id if is_request_id(request.request_id) else None,
                tenant=self._tenant or None,
                status=code,
                finish=",".join(_finish(generation) for generation in generations) or None,
                prompt_tokens=generations[0].num_prompt_tokens if generations else 0,
                cached_tokens=generations[0].cached_tokens if generations else 0,
                thinking_tokens=self._num_thinking,
                answer_tokens=self._num_answer,
                time_to_first_token_s=_seconds(self.first_token_s),
                time_to_first_answer_s=_seconds(self.first_answer_s),
                total_s=_seconds(self._clock() - self._start_s),
                # Of a request that was refused nothing is known to be short.
                metadata=dict(request.metadata) if generations and request.metadata else None,
            ),
        )

    @property
    def _num_thinking(self) -> int:
        return sum(generation.num_thinking_tokens for generation in self._generations)

    @property
    def _num_answer(self) -> int:
        return sum(generation.num_answer_tokens for generation in self._generations)


def _seconds(passed_s: float | None) -> float | None:
    return None if passed_s is None else round(passed_s, 4)


def _finish(generation: Generation) -> str:
    if generation.finished is None:
        return "none"
    return pb.Finished.Reason.Name(generation.finished.reason).removeprefix("REASON_").lower()
