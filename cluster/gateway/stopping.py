"""What ends a generation, or its thoughts: the fields of GenerateRequest for it, checked.

Hop 2, pure. Raises InvalidRequest. Knows nothing of tools, formats or sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from cluster.errors import InvalidRequest
from cluster.gateway.served_model import ServedModel
from mull.v1 import generation_pb2 as pb

MAX_STOPS = 16
MAX_STOP_TOKEN_IDS = 64


def read_stops(request: pb.GenerateRequest) -> tuple[str, ...]:
    """Texts that end the answer."""
    if len(request.stop) > MAX_STOPS:
        raise InvalidRequest(f"stop: {len(request.stop)} texts; send at most {MAX_STOPS}", field="stop")
    for index, text in enumerate(request.stop):
        if not text:
            raise InvalidRequest(f"stop[{index}]: empty; send some text", field=f"stop[{index}]")
    return tuple(dict.fromkeys(request.stop))


def read_stop_token_ids(request: pb.GenerateRequest, vocab_size: int) -> frozenset[int]:
    """Tokens that end the generation besides the checkpoint's own."""
    ids = request.stop_token_ids
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids: {len(ids)} ids; send at most {MAX_STOP_TOKEN_IDS}", field="stop_token_ids"
        )
    check_vocabulary(ids, vocab_size, "stop_token_ids")
    return frozenset(ids)


def check_vocabulary(ids: Iterable[int], vocab_size: int, where: str) -> None:
    """Raises InvalidRequest for the first id that is no token."""
    for index, token_id in enumerate(ids):
        if token_id >= vocab_size:
            field = f"{where}[{index}]"
            raise InvalidRequest(f"{field}: {token_id} is no token; the vocabulary has {vocab_size}", field=field)


def read_min_tokens(request: pb.GenerateRequest, max_tokens: int) -> int:
    """Tokens before which stops do not count."""
    if request.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens: {request.min_tokens} is over the {max_tokens} tokens that may come; lower it",
            field="min_tokens",
        )
    return request.min_tokens


def read_thinking_budget(request: pb.GenerateRequest, model: ServedModel) -> int | None:
    """Thinking tokens at most; None: no limit."""
    if not request.HasField("thinking_budget"):
        return None
    budget = request.thinking_budget
    if model.tags.close_id is None:
        raise InvalidRequest(f"thinking_budget: {model.name} has no thoughts; leave it out", field="thinking_budget")
    if request.HasField("max_tokens") and budget > request.max_tokens:
        raise InvalidRequest(
            f"thinking_budget: {budget} is over max_tokens {request.max_tokens}; lower the one or raise the other",
            field="thinking_budget",
        )
    return budget


def read_timeout(request: pb.GenerateRequest) -> float | None:
    """Seconds that the request may take; None: as long as it needs."""
    if not request.HasField("timeout_seconds"):
        return None
    if not (math.isfinite(request.timeout_seconds) and request.timeout_seconds > 0):
        raise InvalidRequest(
            f"timeout_seconds: {request.timeout_seconds:g}; send a number of seconds above 0, or leave it out",
            field="timeout_seconds",
        )
    return request.timeout_seconds
