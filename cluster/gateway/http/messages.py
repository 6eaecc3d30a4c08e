"""OpenAI's messages and tools → pb.Conversation.

Both shapes: those of chat completions, and the flat items of /v1/responses. Roles and names are checked by the core.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.gateway.http.fields import Fields
from mull.v1 import generation_pb2 as pb

_TEXT_PARTS = ("text", "input_text", "output_text")
_ROLES = {"developer": "system", "function": "tool"}


def read_messages(body: Fields) -> list[pb.Message]:
    """`messages` of a chat completion. Raises InvalidRequest."""
    if not body.list("messages"):
        raise body.wrong("messages", "a list with at least one message")
    return [_message(fields) for fields in body.objects("messages")]


def _message(fields: Fields) -> pb.Message:
    message = pb.Message(role=role_of(fields), content=text_of(fields, "content"))
    if (thoughts := fields.text("reasoning_content") or fields.text("reasoning")) is not None:
        message.reasoning_content = thoughts
    if (call_id := fields.text("tool_call_id")) is not None:
        message.tool_call_id = call_id
    for call in fields.objects("tool_calls"):
        message.tool_calls.append(_tool_call(call))
    return message


def role_of(fields: Fields) -> str:
    """The role, by the name that chat templates know."""
    role = fields.required_text("role")
    return _ROLES.get(role, role)


def text_of(fields: Fields, name: str) -> str:
    """A content: a string, or parts that are texts. Raises InvalidRequest for images, audio and files."""
    value = fields.values.get(name)
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise fields.wrong(name, "a string or a list of text parts")
    return "".join(_part(part) for part in fields.objects(name))


def _part(part: Fields) -> str:
    kind = part.text("type")
    if kind == "refusal":
        return part.text("refusal") or ""
    if kind not in _TEXT_PARTS:
        raise part.refused("type", f"{kind!r} is not served; this model reads text alone")
    return part.text("text") or ""


def _tool_call(call: Fields) -> pb.ToolCall:
    function = call.object("function")
    if function is None:
        raise call.wrong("function", "an object with name and arguments")
    return pb.ToolCall(
        id=call.text("id") or "", name=function.required_text("name"), arguments_json=arguments_of(function)
    )


def arguments_of(function: Fields) -> str:
    """The arguments' JSON text; some clients send the object itself."""
    value = function.values.get("arguments")
    if isinstance(value, dict):
        return json_text(value)
    return function.text("arguments") or ""


def read_tools(body: Fields) -> list[pb.Tool]:
    """`tools`; the function lies in `function`, or flat beside `type` as in /v1/responses. Raises InvalidRequest."""
    return [_tool(fields) for fields in body.objects("tools")]


def _tool(fields: Fields) -> pb.Tool:
    kind = fields.text("type") or "function"
    if kind != "function":
        raise fields.refused("type", f"{kind!r} is not served; send tools of type function")
    function = fields.object("function") or fields
    tool = pb.Tool(name=function.required_text("name"), description=function.text("description") or "")
    if (parameters := function.object("parameters")) is not None:
        tool.parameters_json = json_text(parameters.values)
    return tool


def read_tool_choice(body: Fields) -> pb.ToolChoice | None:
    """`tool_choice`: a word, or the function that must be called. Raises InvalidRequest."""
    value = body.values.get("tool_choice")
    if value is None:
        return None
    if isinstance(value, str):
        modes = {
            "auto": pb.ToolChoice.MODE_AUTO,
            "none": pb.ToolChoice.MODE_NONE,
            "required": pb.ToolChoice.MODE_REQUIRED,
        }
        if value not in modes:
            raise body.refused("tool_choice", f"{value!r} is unknown; send one of auto, none, required or a function")
        return pb.ToolChoice(mode=modes[value])
    choice = body.object("tool_choice")
    assert choice is not None
    kind = choice.text("type")
    if kind != "function":
        raise choice.refused("type", f"{kind!r} is not served; send function")
    return pb.ToolChoice(tool_name=(choice.object("function") or choice).required_text("name"))


def json_text(value: Any) -> str:
    """JSON text with the order of keys as it came."""
    return msgspec.json.encode(value).decode()
