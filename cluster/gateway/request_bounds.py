"""How much a request may hold, looked at before any of it is worked on.

Hop 2, pure. The bytes of the whole message are bounded before it is read; this bounds what costs more than its bytes.
Raises InvalidRequest. Knows nothing of what the fields mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cluster.errors import InvalidRequest
from mull.v1 import generation_pb2 as pb

MAX_MESSAGES = 4096
MAX_TOOLS = 256
MAX_TOOL_CALLS = 256
"""Of one message."""
MAX_NAME_CHARS = 256
MAX_SCHEMA_BYTES = 64 * 1024
MAX_ARGUMENTS_BYTES = 2**20
MAX_JSON_DEPTH = 64
MAX_STOP_CHARS = 1024
MAX_BAD_WORD_CHARS = 1024
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512

_NESTING = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def check_request_bounds(request: pb.GenerateRequest) -> None:
    """All but what has a bound of its own where it is read."""
    check_conversation_bounds(request.conversation)
    _check_json("chat_template_variables_json", request.chat_template_variables_json, MAX_SCHEMA_BYTES)
    _check_json("response_format.json_schema", request.response_format.json_schema, MAX_SCHEMA_BYTES)
    _check_lengths("stop", request.stop, MAX_STOP_CHARS)
    _check_lengths("sampling.bad_words", request.sampling.bad_words, MAX_BAD_WORD_CHARS)
    _check_length("tool_choice.tool_name", request.tool_choice.tool_name, MAX_NAME_CHARS)
    for key, value in request.metadata.items():
        _check_length("metadata", key, MAX_METADATA_KEY_CHARS)
        _check_length("metadata", value, MAX_METADATA_VALUE_CHARS)


def check_conversation_bounds(conversation: pb.Conversation) -> None:
    """Messages, their tool calls, and tools."""
    _check_count("conversation.messages", len(conversation.messages), MAX_MESSAGES)
    _check_count("conversation.tools", len(conversation.tools), MAX_TOOLS)
    for field, call in _calls(conversation.messages):
        _check_length(f"{field}.name", call.name, MAX_NAME_CHARS)
        _check_length(f"{field}.id", call.id, MAX_NAME_CHARS)
        _check_json(f"{field}.arguments_json", call.arguments_json, MAX_ARGUMENTS_BYTES)
    for index, tool in enumerate(conversation.tools):
        field = f"conversation.tools[{index}]"
        _check_length(f"{field}.name", tool.name, MAX_NAME_CHARS)
        _check_json(f"{field}.parameters_json", tool.parameters_json, MAX_SCHEMA_BYTES)


def json_depth(text: str) -> int:
    """How deep brackets lie in each other, those in strings aside; of text that is no JSON, a number of no meaning."""
    depth = deepest = 0
    for mark in _NESTING.finditer(text):
        if mark[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif mark[0] in "]}":
            depth -= 1
    return deepest


def _calls(messages: Sequence[pb.Message]) -> Iterator[tuple[str, pb.ToolCall]]:
    for index, message in enumerate(messages):
        field = f"conversation.messages[{index}].tool_calls"
        _check_count(field, len(message.tool_calls), MAX_TOOL_CALLS)
        for number, call in enumerate(message.tool_calls):
            yield f"{field}[{number}]", call


def _check_count(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(f"{field}: {count} of them; send at most {limit}", field=field)


def _check_lengths(field: str, texts: Sequence[str], limit: int) -> None:
    for index, text in enumerate(texts):
        _check_length(f"{field}[{index}]", text, limit)


def _check_length(field: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise InvalidRequest(f"{field}: {len(text)} characters; send at most {limit}", field=field)


def _check_json(field: str, text: str, limit: int) -> None:
    # A character has at least a byte: most texts need not be encoded to be counted.
    if len(text) > limit or (4 * len(text) > limit and len(text.encode()) > limit):
        raise InvalidRequest(f"{field}: {len(text)} characters; send at most {limit} bytes", field=field)
    if (depth := json_depth(text)) > MAX_JSON_DEPTH:
        raise InvalidRequest(f"{field}: {depth} levels; send at most {MAX_JSON_DEPTH}", field=field)
