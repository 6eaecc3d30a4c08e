"""Conversation → the prompt's text: roles, tool calls and tool schemas checked, then the chat template.

Hop 2. Messages reach the template in the shape that chat templates are written for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from cluster.errors import InvalidRequest
from cluster.text.chat_template import TemplateError
from cluster.text.phases import THINK_END, THINK_START
from cluster.text.tokenizer import Tokenizer
from mull.v1 import generation_pb2 as pb

ROLES = ("system", "user", "assistant", "tool")


TEMPLATE_NAMES = frozenset({"messages", "tools", "add_generation_prompt"})


def render_conversation(
    turns: Sequence[pb.Message],
    shown_tools: Sequence[pb.Tool],
    tokenizer: Tokenizer,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt's text. Raises InvalidRequest, with the template's own words where it refuses."""
    if not turns:
        raise InvalidRequest("conversation.messages: empty; send at least one message", field="conversation.messages")
    messages = [_message(index, message) for index, message in enumerate(turns)]
    tools = [_tool(index, tool) for index, tool in enumerate(shown_tools)]
    try:
        return tokenizer.render_chat(messages, tools, variables)
    except TemplateError as error:
        raise InvalidRequest(f"conversation: the chat template refuses it: {error}", field="conversation") from error


def read_template_variables(text: str) -> dict[str, Any]:
    """More variables for the chat template, from JSON. Raises InvalidRequest."""
    field = "chat_template_variables_json"
    variables = _json_object(field, text or "{}")
    if taken := TEMPLATE_NAMES & variables.keys():
        raise InvalidRequest(f"{field}: {min(taken)!r} is set by the server; leave it out", field=field)
    return variables


def variables_without_template() -> InvalidRequest:
    """The error of template variables beside an input that no template sees."""
    field = "chat_template_variables_json"
    return InvalidRequest(f"{field}: only a conversation goes through the template; leave it out", field=field)


def _message(index: int, message: pb.Message) -> dict[str, Any]:
    where = f"conversation.messages[{index}]"
    if message.role not in ROLES:
        field = f"{where}.role"
        raise InvalidRequest(f"{field}: {message.role!r} is unknown; send one of {', '.join(ROLES)}", field=field)
    if message.role != "assistant" and (message.tool_calls or message.reasoning_content):
        field = f"{where}.{'tool_calls' if message.tool_calls else 'reasoning_content'}"
        raise InvalidRequest(f"{field}: only an assistant message may have it, this one is {message.role}", field=field)
    # Thoughts of earlier turns must not come back to the model, whatever the template would do with them.
    content = without_thoughts(message.content) if message.role == "assistant" else message.content
    turn: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(message.tool_calls)]
    return turn


def without_thoughts(content: str) -> str:
    """An assistant's text from after its closing tag on; all of it where there is none.

    The opening tag may be missing, because the template had written it. Without a closing tag the text is a cut-off
    thought only if it begins with the opening one.
    """
    _, tag, answer = content.rpartition(THINK_END)
    if tag:
        return answer.lstrip("\n")
    return "" if content.lstrip().startswith(THINK_START) else content


def _call(where: str, call: pb.ToolCall) -> dict[str, Any]:
    arguments = _json_object(f"{where}.arguments_json", call.arguments_json or "{}")
    function = {"name": _name(where, call.name), "arguments": arguments}
    return {"type": "function", "function": function} | ({"id": call.id} if call.id else {})


def _tool(index: int, tool: pb.Tool) -> dict[str, Any]:
    where = f"conversation.tools[{index}]"
    function: dict[str, Any] = {"name": _name(where, tool.name)}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters_json:
        function["parameters"] = _json_object(f"{where}.parameters_json", tool.parameters_json)
    return {"type": "function", "function": function}


def _name(where: str, name: str) -> str:
    if not name:
        raise InvalidRequest(f"{where}.name: empty; name the tool", field=f"{where}.name")
    return name


def _json_object(field: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field}: is not JSON ({error}); send an object", field=field) from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"{field}: is a JSON {type(value).__name__}; send an object", field=field)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
