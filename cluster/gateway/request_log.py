"""One log line for each request, at its end: who it was, how it ended, how many tokens; never any of its text.

Between hops 1 and 11. What a client noted in `metadata` is in it, so that its own systems find the request again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from cluster.gateway.generation import Generation
from cluster.gateway.requests import is_request_id
from mull.v1 import generation_pb2 as pb

logger = logging.getLogger(__name__)


class RequestRecord:
    """What is told of one request."""

    def __init__(self, request: pb.GenerateRequest, tenant: str) -> None:
        """`tenant` is empty where no keys are asked for."""
        self._request = request
        self._tenant = tenant
        self._generations: Sequence[Generation] = ()

    def on_submitted(self, generations: Sequence[Generation]) -> None:
        """Its generations, which count their tokens themselves."""
        self._generations = tuple(generations)

    def on_ended(self, code: str) -> None:
        """Write the line; `code` is the status that the client got, or would have got."""
        generations, request = self._generations, self._request
        # Of a request that was refused nothing is known to be short, or to stay on one line.
        notes = dict(request.metadata) if generations else {}
        logger.info(
            "request %s%s ended: status %s, finish %s, "
            "prompt tokens %d, cached %d, thinking %d, answer %d, metadata %s",
            request.request_id if is_request_id(request.request_id) else "without a valid id",
            f" of {self._tenant}" if self._tenant else "",
            code,
            ",".join(_finish(generation) for generation in generations) or "none",
            generations[0].num_prompt_tokens if generations else 0,
            generations[0].cached_tokens if generations else 0,
            sum(generation.num_thinking_tokens for generation in generations),
            sum(generation.num_answer_tokens for generation in generations),
            # As JSON it stays on one line, whatever a client put into it.
            json.dumps(notes, sort_keys=True),
        )


def _finish(generation: Generation) -> str:
    if generation.finished is None:
        return "none"
    return pb.Finished.Reason.Name(generation.finished.reason).removeprefix("REASON_").lower()
