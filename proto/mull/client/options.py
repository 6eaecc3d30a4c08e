"""What a request is made of: messages, tools and options by name → GenerateRequest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from mull.v1 import generation_pb2 as pb


@dataclass(frozen=True)
class Message:
    """A turn of a conversation."""

    role: str
    content: str = ""
    tool_calls: tuple[pb.ToolCall, ...] = ()
    """Assistant turns only."""
    tool_call_id: str = ""
    """Tool turns only: the call that this is the result of."""


@dataclass(frozen=True)
class Tool:
    """What the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None


Messages = str | Sequence[Message | Mapping[str, Any]]
"""A question, or turns; a mapping has the fields of `Message`."""


class Options(TypedDict, total=False):
    """Options of a generation; generation.proto has the unit and the bounds of each."""

    model: str
    request_id: str
    max_tokens: int
    n: int
    thinking_budget: int
    priority: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    tool_choice: Literal["auto", "none", "required"]
    required_tool: str
    """The model must call this one."""
    parallel_tool_calls: bool
    raw_tool_calls: bool
    json_object: bool
    """The answer is any JSON object. At most one of this and the four that follow."""
    json_schema: Mapping[str, Any]
    regex: str
    grammar: str
    one_of: Sequence[str]
    """The answer is one of these texts."""
    format_scope: Literal["answer_only", "all"]
    template_variables: Mapping[str, Any]
    metadata: Mapping[str, str]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    logprobs: int
    prompt_logprobs: int
    logit_bias: Mapping[int, float]
    bad_words: Sequence[str]


_SAMPLING = frozenset(field.name for field in pb.SamplingOptions.DESCRIPTOR.fields)
_CHOICES = {"auto": pb.ToolChoice.MODE_AUTO, "none": pb.ToolChoice.MODE_NONE, "required": pb.ToolChoice.MODE_REQUIRED}
_SCOPES = {"answer_only": pb.ResponseFormat.SCOPE_ANSWER_ONLY, "all": pb.ResponseFormat.SCOPE_ALL}
_FORMATS = frozenset({"json_object", "json_schema", "regex", "grammar", "one_of"})
_PLAIN = frozenset(
    {"model", "request_id", "max_tokens", "n", "thinking_budget", "priority", "stop_token_ids", "min_tokens"}
    | {"ignore_eos", "parallel_tool_calls", "raw_tool_calls", "metadata"}
)


def chat_request(
    messages: Messages, system: str | None, tools: Sequence[Tool], options: Mapping[str, Any]
) -> pb.GenerateRequest:
    """A request with a conversation. Raises TypeError for an unknown option, ValueError for two formats."""
    request = _request(options)
    request.conversation.CopyFrom(conversation(messages, system, tools))
    return request


def prompt_request(prompt: str | Sequence[int], options: Mapping[str, Any]) -> pb.GenerateRequest:
    """A request with text or token ids as they are. Raises as `chat_request`."""
    request = _request(options)
    if isinstance(prompt, str):
        request.raw_prompt = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


def conversation(messages: Messages, system: str | None = None, tools: Sequence[Tool] = ()) -> pb.Conversation:
    """Turns and tools as the protocol has them."""
    turns: list[Message | Mapping[str, Any]] = [] if system is None else [Message("system", system)]
    turns += [Message("user", messages)] if isinstance(messages, str) else messages
    return pb.Conversation(messages=map(_turn, turns), tools=map(_tool, tools))


def _turn(message: Message | Mapping[str, Any]) -> pb.Message:
    turn = message if isinstance(message, Message) else Message(**message)
    return pb.Message(role=turn.role, content=turn.content, tool_calls=turn.tool_calls, tool_call_id=turn.tool_call_id)


def _tool(tool: Tool) -> pb.Tool:
    parameters = "" if tool.parameters is None else json.dumps(tool.parameters, ensure_ascii=False)
    return pb.Tool(name=tool.name, description=tool.description, parameters_json=parameters)


def _request(options: Mapping[str, Any]) -> pb.GenerateRequest:
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option {min(unknown)!r}; known are {', '.join(sorted(Options.__annotations__))}")
    request = pb.GenerateRequest(
        sampling=pb.SamplingOptions(**{name: options[name] for name in _SAMPLING & options.keys()}),
        **{name: options[name] for name in _PLAIN & options.keys()},
    )
    stop = options.get("stop", ())
    request.stop.extend([stop] if isinstance(stop, str) else stop)
    if "template_variables" in options:
        request.chat_template_variables_json = json.dumps(options["template_variables"])
    if "tool_choice" in options:
        request.tool_choice.mode = _CHOICES[options["tool_choice"]]
    if "required_tool" in options:
        request.tool_choice.tool_name = options["required_tool"]
    _set_format(request, options)
    return request


def _set_format(request: pb.GenerateRequest, options: Mapping[str, Any]) -> None:
    names = sorted(_FORMATS & {name for name, value in options.items() if value is not False})
    if len(names) > 1:
        raise ValueError(f"{names[0]} and {names[1]} are both given; the answer can have one form")
    for name in names:
        value = options[name]
        match name:
            case "json_object":
                request.response_format.json_object.SetInParent()
            case "json_schema":
                request.response_format.json_schema = json.dumps(value, ensure_ascii=False)
            case "one_of":
                request.response_format.choices.texts.extend(value)
            case _:
                setattr(request.response_format, name, value)
    if "format_scope" in options:
        request.response_format.scope = _SCOPES[options["format_scope"]]
