"""GenerateRequest → PreparedRequest: every check on what a client sent, then template, encoding and defaults.

Hop 2. Pure: nothing here waits or keeps state, so that a long prompt can be prepared in a thread. Whatever is wrong
becomes a RequestError whose `field` is the path in GenerateRequest. Knows nothing of streams, Routers or status codes.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import InvalidRequest, PromptTooLong, UnknownModel
from cluster.gateway.conversations import render_conversation
from cluster.gateway.sampling_options import read_sampling
from cluster.gateway.served_model import ServedModel
from mull.v1 import generation_pb2 as pb
from workers.step import SamplingParams

MAX_REQUEST_ID_CHARS = 128
DEFAULT_MAX_TOKENS = 32768


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRequest:
    """A valid request with all defaults put in."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int]
    starts_thinking: bool


def prepare(request: pb.GenerateRequest, model: ServedModel) -> PreparedRequest:
    """Check and complete a request. Raises RequestError."""
    if request.model and request.model != model.name:
        raise UnknownModel(f"model: no model {request.model!r} here, this server has {model.name!r}", field="model")
    request_id = _request_id(request.request_id)
    sampling = read_sampling(request.sampling, model.defaults)
    prompt_ids = _prompt_ids(request, model)
    return PreparedRequest(
        request_id=request_id,
        prompt_ids=prompt_ids,
        sampling=sampling,
        max_tokens=_max_tokens(request, len(prompt_ids), model.max_model_len),
        stop_token_ids=model.defaults.stop_token_ids,
        starts_thinking=model.starts_thinking(prompt_ids),
    )


def new_request_id() -> str:
    """An id for a request that came without one."""
    return uuid.uuid4().hex


def is_request_id(text: str) -> bool:
    """Whether `text` can go to logs and headers as it is."""
    return 0 < len(text) <= MAX_REQUEST_ID_CHARS and text.isascii() and text.isprintable()


def _request_id(given: str) -> str:
    if not given:
        return new_request_id()
    if not is_request_id(given):
        raise InvalidRequest(
            f"request_id: {len(given)} characters; send at most {MAX_REQUEST_ID_CHARS}, all printable ASCII",
            field="request_id",
        )
    return given


def _prompt_ids(request: pb.GenerateRequest, model: ServedModel) -> list[int]:
    match request.WhichOneof("input"):
        case "conversation":
            return model.tokenizer.encode(render_conversation(request.conversation, model.tokenizer))
        case "raw_prompt":
            if not request.raw_prompt:
                raise InvalidRequest("raw_prompt: empty; send some text", field="raw_prompt")
            return model.tokenizer.encode(request.raw_prompt)
        case "token_ids":
            return _checked_token_ids(request.token_ids.ids, model.vocab_size)
        case _:
            raise InvalidRequest("input: nothing given; send conversation, raw_prompt or token_ids", field="input")


def _checked_token_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    if not ids:
        raise InvalidRequest("token_ids.ids: empty; send at least one token id", field="token_ids.ids")
    prompt_ids = list(ids)
    highest = max(prompt_ids)
    if highest >= vocab_size:
        field = f"token_ids.ids[{prompt_ids.index(highest)}]"
        raise InvalidRequest(f"{field}: {highest} is no token; the vocabulary has {vocab_size}", field=field)
    return prompt_ids


def _max_tokens(request: pb.GenerateRequest, num_prompt_tokens: int, max_model_len: int) -> int:
    """The output limit: what the client asked for if the context holds it, else what the context leaves."""
    left = max_model_len - num_prompt_tokens
    if left < 1:
        field = request.WhichOneof("input") or "input"
        raise PromptTooLong(
            f"{field}: the prompt has {num_prompt_tokens} tokens, the context holds {max_model_len} with the output; "
            f"shorten it to {max_model_len - 1} or less",
            field=field,
        )
    if not request.HasField("max_tokens"):
        return min(DEFAULT_MAX_TOKENS, left)
    if request.max_tokens < 1:
        raise InvalidRequest(
            f"max_tokens: {request.max_tokens} is not positive; send at least 1 or leave it out", field="max_tokens"
        )
    if request.max_tokens > left:
        raise InvalidRequest(
            f"max_tokens: {num_prompt_tokens} prompt tokens and {request.max_tokens} more do not fit the context of "
            f"{max_model_len}; send at most {left} or leave it out",
            field="max_tokens",
        )
    return request.max_tokens
