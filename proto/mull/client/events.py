"""The events of a stream as dataclasses. Reasons and phases are words in lower case: "natural", "budget", "length"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mull.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the likeliest tokens."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one token: natural logarithms."""

    logprob: float
    top: tuple[TopLogprob, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one generation; `prompt_tokens` include the cached ones."""

    prompt_tokens: int
    cached_tokens: int
    thinking_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Started:
    """The first event of a generation."""

    sequence: int
    choice: int
    request_id: str
    model: str
    seed: int
    prompt_tokens: int
    cached_tokens: int
    prompt_logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, slots=True)
class ThinkingDelta:
    """A piece of the thoughts."""

    sequence: int
    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, slots=True)
class ThinkingEnded:
    """The thoughts are over: "natural", "budget", "length" or "stop"."""

    sequence: int
    choice: int
    reason: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """A piece of the answer."""

    sequence: int
    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The model began to call a tool."""

    sequence: int
    choice: int
    index: int
    id: str
    name: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, slots=True)
class ToolCallArgumentsDelta:
    """A piece of the JSON text of a call's arguments."""

    sequence: int
    choice: int
    index: int
    arguments_json: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a generation: "stop", "length", "tool_calls" or "stop_text"."""

    sequence: int
    choice: int
    reason: str
    phase: str
    usage: Usage
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    stop: str
    notes: tuple[str, ...]


Event = Started | ThinkingDelta | ThinkingEnded | AnswerDelta | ToolCallStart | ToolCallArgumentsDelta | Finished

_CLASSES: dict[str, type[Any]] = {
    "started": Started,
    "thinking_delta": ThinkingDelta,
    "thinking_ended": ThinkingEnded,
    "answer_delta": AnswerDelta,
    "tool_call_start": ToolCallStart,
    "tool_call_arguments_delta": ToolCallArgumentsDelta,
    "finished": Finished,
}
EVENT_NAMES = {kind: name for name, kind in _CLASSES.items()}
"""Class → the name that the protocol has for it."""


def to_event(message: pb.GenerateEvent) -> Event | None:
    """The dataclass of a message; None for a kind of event that this client is too old for."""
    name = message.WhichOneof("event")
    if name is None:
        return None
    body = getattr(message, name)
    fields = {field.name: _plain(body, field) for field in body.DESCRIPTOR.fields}
    event: Event = _CLASSES[name](sequence=message.sequence, choice=message.choice, **fields)
    return event


def enum_word(descriptor: Any, number: int) -> str:
    """The value's name in lower case without its prefix; its number where this client does not know it."""
    if number not in descriptor.values_by_number:
        return str(number)
    prefix = descriptor.values[0].name.removesuffix("UNSPECIFIED")
    return str(descriptor.values_by_number[number].name).removeprefix(prefix).lower()


def to_usage(message: pb.Usage) -> Usage:
    """Usage as a dataclass."""
    return Usage(message.prompt_tokens, message.cached_tokens, message.thinking_tokens, message.answer_tokens)


def to_logprobs(message: pb.Logprobs) -> Logprobs:
    """Logprobs as a dataclass."""
    return Logprobs(message.logprob, tuple(TopLogprob(top.token_id, top.text, top.logprob) for top in message.top))


def _plain(body: Any, field: Any) -> Any:
    value = getattr(body, field.name)
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    if field.message_type is None:
        return tuple(value) if field.is_repeated else value
    if field.is_repeated:
        return tuple(map(to_logprobs, value))
    return to_usage(value)
