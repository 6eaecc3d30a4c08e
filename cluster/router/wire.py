"""Between router.proto and what the scheduler knows: checks a Submit, fills updates.

Hop 4, pure. The gateway has validated what clients sent; this checks what a release mismatch or a bug could break.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from cluster.errors import InvalidRequest
from cluster.router.balancer import ModelExperts
from cluster.router.sequence import FinishReason, SequenceRequest, SequenceUpdate
from cluster.text.sampling_ranges import SAMPLING_RANGES
from mull.v1 import router_pb2 as pb
from workers.step import Grammar, GrammarKind, SamplingParams, TokenLogprobs

MAX_LOGIT_BIAS = 100
MAX_PROMPT_SCORES = 2**18
"""At most 3 MiB on the wire, where gRPC takes 4."""

_GRAMMAR_KINDS: dict[int, GrammarKind] = {
    pb.Grammar.KIND_JSON_SCHEMA: "json_schema",
    pb.Grammar.KIND_JSON_OBJECT: "json_object",
    pb.Grammar.KIND_REGEX: "regex",
    pb.Grammar.KIND_EBNF: "ebnf",
}
_END = {
    FinishReason.STOP: pb.End.REASON_STOP,
    FinishReason.LENGTH: pb.End.REASON_LENGTH,
    FinishReason.CANCELLED: pb.End.REASON_CANCELLED,
    FinishReason.GIVEN_UP: pb.End.REASON_ERROR,
}
GIVEN_UP = "the ranks that computed this request failed each time; it is given up, do not send it again"


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the Router needs to know of its model."""

    name: str
    vocab_size: int
    max_model_len: int
    """Longest prompt plus output, in tokens."""
    think_end_id: int | None
    """The token that ends the thoughts; None for a model that has none."""
    experts: ModelExperts | None = None
    """None: it has none."""


class RequestKey(NamedTuple):
    """Names a request at the scheduler: the session it came over, and the gateway's key in it.

    A tuple, since it is hashed for every token.
    """

    session: int
    key: int


def to_request(submit: pb.Submit, session: int, model: ModelInfo) -> SequenceRequest:
    """A checked request. Raises InvalidRequest."""
    if not submit.prompt_ids:
        raise InvalidRequest("the prompt is empty; send at least one token", field="input")
    if submit.max_tokens < 1:
        raise InvalidRequest("max_tokens is 0; ask for at least 1", field="max_tokens")
    _check_vocabulary(submit.prompt_ids, model, "input")
    _check_vocabulary(submit.stop_token_ids, model, "stop_token_ids")
    _check_vocabulary(submit.output_ids, model, "resume")
    grammar = _grammar(submit, model)
    return SequenceRequest(
        key=RequestKey(session, submit.key),
        prompt_ids=list(submit.prompt_ids),
        sampling=_sampling(submit.sampling),
        max_tokens=submit.max_tokens,
        stop_token_ids=frozenset(submit.stop_token_ids),
        # What must match a grammar from its first token on is an answer.
        starts_thinking=submit.starts_thinking and (grammar is None or grammar.start_id is not None),
        think_end_id=model.think_end_id,
        thinking_budget=submit.thinking_budget if submit.HasField("thinking_budget") else None,
        close_thinking_ids=_close_thinking_ids(submit, model),
        min_tokens=submit.min_tokens,
        priority=submit.priority,
        logit_bias=_logit_bias(submit.sampling, model),
        bad_words=_bad_words(submit, model),
        grammar=grammar,
        num_prompt_logprobs=_num_prompt_logprobs(submit),
        cache_salt=submit.cache_salt,
        output_ids=list(submit.output_ids),
        request_id=submit.request_id,
        trace_parent=submit.trace_parent,
    )


def _num_prompt_logprobs(submit: pb.Submit) -> int | None:
    if not submit.HasField("num_prompt_logprobs"):
        return None
    count, num_prompt, field = submit.num_prompt_logprobs, len(submit.prompt_ids), "prompt_logprobs"
    if count not in SAMPLING_RANGES["logprobs"]:
        raise InvalidRequest(f"{field} {count} is outside of {SAMPLING_RANGES['logprobs']}", field=field)
    if num_prompt * (1 + count) > MAX_PROMPT_SCORES:
        raise InvalidRequest(
            f"{count} logprobs for each of {num_prompt} prompt tokens are too much for one message, which holds "
            f"{MAX_PROMPT_SCORES}; ask for fewer",
            field=field,
        )
    return count


def _close_thinking_ids(submit: pb.Submit, model: ModelInfo) -> list[int]:
    """What closes the thoughts: without a phrase, the tag alone."""
    if model.think_end_id is None:
        if submit.HasField("thinking_budget"):
            raise InvalidRequest("this model has no tag that ends its thoughts; leave it out", field="thinking_budget")
        return []
    ids = list(submit.close_thinking_ids) or [model.think_end_id]
    _check_vocabulary(ids, model, "close_thinking_ids")
    if model.think_end_id not in ids:
        raise InvalidRequest(f"close_thinking_ids lack {model.think_end_id}, the tag", field="close_thinking_ids")
    return ids


def _grammar(submit: pb.Submit, model: ModelInfo) -> Grammar | None:
    """The gateway has compiled it."""
    if not submit.HasField("grammar"):
        return None
    kind = _GRAMMAR_KINDS.get(submit.grammar.kind)
    if kind is None:
        raise InvalidRequest(f"unknown kind of grammar {submit.grammar.kind}", field="response_format")
    waits = submit.grammar.after_thinking and submit.starts_thinking
    if submit.starts_thinking and not waits and submit.HasField("thinking_budget"):
        raise InvalidRequest("a grammar from the first token on leaves no thoughts to limit", field="thinking_budget")
    return Grammar(kind, submit.grammar.text, model.think_end_id if waits else None)


def _logit_bias(wire: pb.RouterSampling, model: ModelInfo) -> list[tuple[int, float]]:
    _check_vocabulary(wire.logit_bias, model, "logit_bias")
    for token_id, value in wire.logit_bias.items():
        if not abs(value) <= MAX_LOGIT_BIAS:
            limit = f"[-{MAX_LOGIT_BIAS}, {MAX_LOGIT_BIAS}]"
            raise InvalidRequest(f"logit_bias {value:g} of token {token_id} is outside of {limit}", field="logit_bias")
    return list(wire.logit_bias.items())


def _bad_words(submit: pb.Submit, model: ModelInfo) -> list[list[int]]:
    words = [list(word.ids) for word in submit.bad_words]
    if not all(words):
        raise InvalidRequest("a bad word has 0 tokens; each needs at least 1", field="bad_words")
    for word in words:
        _check_vocabulary(word, model, "bad_words")
    return words


def _check_vocabulary(token_ids: Iterable[int], model: ModelInfo, field: str) -> None:
    largest = max(token_ids, default=0)
    if largest >= model.vocab_size:
        raise InvalidRequest(f"token id {largest} is not in the vocabulary of {model.vocab_size}", field=field)


def _sampling(wire: pb.RouterSampling) -> SamplingParams:
    params = SamplingParams(
        temperature=wire.temperature,
        top_k=wire.top_k,
        top_p=wire.top_p,
        min_p=wire.min_p,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        repetition_penalty=wire.repetition_penalty,
        seed=wire.seed,
        num_logprobs=wire.num_logprobs if wire.HasField("num_logprobs") else None,
    )
    _check_ranges(params)
    return params


def _check_ranges(params: SamplingParams) -> None:
    """One slot's bad number must not reach the ranks: there it would spoil the step of all."""
    values = msgspec.structs.asdict(params)
    values["logprobs"] = values.pop("num_logprobs")
    for name, range_ in SAMPLING_RANGES.items():
        value = values[name]
        if value is not None and value not in range_:
            raise InvalidRequest(f"{name} {value:g} is outside of {range_}", field=name)


def update_weight(update: SequenceUpdate) -> int:
    """Items in it: itself, its tokens and its logprobs; each takes at most 12 bytes on the wire."""
    scores = [*update.logprobs, *update.prompt_logprobs]
    return 1 + len(update.token_ids) + sum(1 + len(item.top) for item in scores)


def merge_update(into: pb.SequenceUpdate, update: SequenceUpdate) -> None:
    """Append what a step has for a request to what its gateway has not read yet."""
    if update.admitted_cached_tokens is not None:
        into.admitted.cached_tokens = update.admitted_cached_tokens
    into.token_ids.extend(update.token_ids)
    into.num_forced = update.num_forced
    if update.logprobs:
        into.logprobs.extend([_logprobs(item) for item in update.logprobs])
    if update.prompt_logprobs:
        into.prompt_logprobs.extend([_logprobs(item) for item in update.prompt_logprobs])
    if update.finish is not None:
        into.end.reason = _END[update.finish]
        if update.finish is FinishReason.GIVEN_UP:
            into.end.message = GIVEN_UP


def _logprobs(item: TokenLogprobs) -> pb.RouterLogprobs:
    return pb.RouterLogprobs(
        logprob=item.logprob,
        top_ids=[token_id for token_id, _ in item.top],
        top_logprobs=[logprob for _, logprob in item.top],
    )
