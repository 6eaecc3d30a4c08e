"""GenerateRequest → PreparedRequest: every check on what a client sent, then template, encoding and defaults.

Hop 2. Pure: nothing here waits or keeps state, so that a long prompt can be prepared in a thread. Whatever is wrong
becomes a RequestError whose `field` is the path in GenerateRequest. Knows nothing of streams, Routers or status codes.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.errors import InvalidRequest, PromptTooLong, UnknownModel
from cluster.gateway.answer_format import read_response_format, required_calls
from cluster.gateway.conversations import read_template_variables, render_conversation, variables_without_template
from cluster.gateway.request_bounds import check_request_bounds
from cluster.gateway.resume_options import HeldChoice, read_resume
from cluster.gateway.sampling_options import read_bad_words, read_logit_bias, read_prompt_logprobs, read_sampling
from cluster.gateway.served_model import ServedModel
from cluster.gateway.stopping import (
    read_min_tokens,
    read_stop_token_ids,
    read_stops,
    read_thinking_budget,
    read_timeout,
)
from cluster.gateway.tool_options import ToolUse, read_tool_use
from cluster.text.answer import AnswerRules
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2
from workers.step import SamplingParams

MAX_REQUEST_ID_CHARS = 128
DEFAULT_MAX_TOKENS = 32768
MAX_CHOICES = 16
MAX_METADATA = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_CHARS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRequest:
    """A valid request with all defaults put in."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int]
    """Tokens that end a generation."""
    starts_thinking: bool
    n: int = 1
    """Generations of the same prompt."""
    own_stop_ids: frozenset[int] = frozenset()
    """Those of the stop tokens that end the model's turn by itself."""
    min_tokens: int = 0
    rules: AnswerRules = field(default_factory=AnswerRules)
    thinking_budget: int | None = None
    close_thinking_ids: tuple[int, ...] = ()
    priority: int = 0
    has_priority: bool = False
    """Whether the client asked for one."""
    tenant: str = ""
    cache_salt: str = ""
    """Only requests with the same one share cached blocks."""
    grammar: router_pb2.Grammar | None = None
    grammar_field: str = "response_format"
    """Where the grammar came from."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[tuple[int, ...], ...] = ()
    num_prompt_logprobs: int | None = None
    timeout_s: float | None = None
    held: Mapping[int, HeldChoice] = field(default_factory=dict)
    """What the client has already, by choice."""
    is_resumed: bool = False
    """It goes on with an earlier call."""
    trace_parent: str = ""
    """The span that it belongs to, as W3C Trace Context writes it; empty: nobody traces it."""

    def seed_of(self, choice: int) -> int:
        """The seed of one of the `n` generations."""
        return self.sampling.seed + choice


def prepare(request: pb.GenerateRequest, model: ServedModel) -> PreparedRequest:
    """Check and complete a request. Raises RequestError."""
    check_model(request.model, model)
    check_request_bounds(request)
    request_id = _request_id(request.request_id)
    n = _num_choices(request)
    sampling = read_sampling(request.sampling, model.defaults, n)
    tools = read_tool_use(request)
    grammar = read_response_format(request, tools)
    budget = read_thinking_budget(request, model)
    stops, client_stop_ids = read_stops(request), read_stop_token_ids(request, model.vocab_size)
    _check_metadata(request)
    timeout_s = read_timeout(request)
    prompt_ids = _prompt_ids(request, model, tools)
    max_tokens = _max_tokens(request, len(prompt_ids), model.max_model_len)
    own_stop_ids = frozenset() if request.ignore_eos else model.defaults.stop_token_ids
    min_tokens = read_min_tokens(request, max_tokens)
    return PreparedRequest(
        request_id=request_id,
        n=n,
        prompt_ids=prompt_ids,
        sampling=sampling,
        max_tokens=max_tokens,
        stop_token_ids=own_stop_ids | client_stop_ids,
        own_stop_ids=own_stop_ids,
        min_tokens=min_tokens,
        rules=AnswerRules(
            stops=stops,
            min_tokens=min_tokens,
            tool_tags=model.tool_tags if tools.is_parsed else None,
            max_tool_calls=tools.max_calls,
        ),
        starts_thinking=model.starts_thinking(prompt_ids),
        thinking_budget=budget,
        close_thinking_ids=model.close_at_once_ids if budget == 0 else model.close_ids,
        priority=request.priority,
        has_priority=request.HasField("priority"),
        # Not before the prompt was rendered, which checks the tools' schemas.
        grammar=grammar or required_calls(tools, model.tool_tags),
        grammar_field="tool_choice" if tools.required else "response_format",
        logit_bias=read_logit_bias(request.sampling, model.vocab_size),
        bad_words=read_bad_words(request.sampling, model.tokenizer),
        num_prompt_logprobs=read_prompt_logprobs(request.sampling),
        timeout_s=timeout_s,
        held=read_resume(request, n=n, sampling=sampling, max_tokens=max_tokens, vocab_size=model.vocab_size),
        is_resumed=request.HasField("resume"),
    )


def check_model(name: str, model: ServedModel) -> None:
    """Raises UnknownModel for a name other than the one that is served."""
    if name and name != model.name:
        raise UnknownModel(f"model: no model {name!r} here, this server has {model.name!r}", field="model")


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


def _num_choices(request: pb.GenerateRequest) -> int:
    if not request.HasField("n"):
        return 1
    if not 1 <= request.n <= MAX_CHOICES:
        raise InvalidRequest(f"n: {request.n} generations; send 1 to {MAX_CHOICES}", field="n")
    return request.n


def _check_metadata(request: pb.GenerateRequest) -> None:
    if len(request.metadata) > MAX_METADATA:
        raise InvalidRequest(
            f"metadata: {len(request.metadata)} entries; send at most {MAX_METADATA}", field="metadata"
        )
    for key, note in request.metadata.items():
        if len(key) > MAX_METADATA_KEY_CHARS or len(note) > MAX_METADATA_CHARS:
            raise InvalidRequest(
                f"metadata: a key of {len(key)} and a value of {len(note)} characters; send at most "
                f"{MAX_METADATA_KEY_CHARS} and {MAX_METADATA_CHARS}",
                field="metadata",
            )


def _prompt_ids(request: pb.GenerateRequest, model: ServedModel, tools: ToolUse) -> list[int]:
    kind = request.WhichOneof("input")
    if request.chat_template_variables_json and kind != "conversation":
        raise variables_without_template()
    match kind:
        case "conversation":
            variables = read_template_variables(request.chat_template_variables_json)
            text = render_conversation(request.conversation.messages, tools.shown, model.tokenizer, variables)
            return model.tokenizer.encode(text)
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
