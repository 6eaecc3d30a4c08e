"""What the answer must look like, as the Router's Grammar: response_format, or the tool calls that are required.

Hop 2, pure. Raises InvalidRequest. Knows neither tokens nor how a grammar is enforced.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from cluster.errors import InvalidRequest
from cluster.gateway.tool_options import ToolUse
from cluster.text.answer import ToolTags
from cluster.text.tool_grammar import ToolSignature, choice_grammar, tool_call_grammar
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2

MAX_CHOICES = 1024
_KINDS = {
    "json_object": router_pb2.Grammar.KIND_JSON_OBJECT,
    "json_schema": router_pb2.Grammar.KIND_JSON_SCHEMA,
    "regex": router_pb2.Grammar.KIND_REGEX,
    "grammar": router_pb2.Grammar.KIND_EBNF,
    "choices": router_pb2.Grammar.KIND_EBNF,
}


def read_response_format(request: pb.GenerateRequest, tools: ToolUse) -> router_pb2.Grammar | None:
    """The grammar that the client asked for; None: anything goes."""
    if not request.HasField("response_format"):
        return None
    if tools.required:
        raise InvalidRequest(
            "response_format: tool_choice requires a tool call; leave one of them out", field="response_format"
        )
    wanted = request.response_format
    name = wanted.WhichOneof("format")
    if name is None:
        raise InvalidRequest(
            f"response_format: no format given; send one of {', '.join(_KINDS)}", field="response_format"
        )
    return router_pb2.Grammar(kind=_KINDS[name], text=_text(wanted, name), after_thinking=_after_thinking(wanted))


def _after_thinking(wanted: pb.ResponseFormat) -> bool:
    known = (pb.ResponseFormat.SCOPE_UNSPECIFIED, pb.ResponseFormat.SCOPE_ANSWER_ONLY, pb.ResponseFormat.SCOPE_ALL)
    if wanted.scope not in known:
        raise InvalidRequest(
            f"response_format.scope: {wanted.scope} is unknown; send ANSWER_ONLY or ALL", field="response_format.scope"
        )
    return wanted.scope != pb.ResponseFormat.SCOPE_ALL


def _text(wanted: pb.ResponseFormat, name: str) -> str:
    field = f"response_format.{name}"
    match name:
        case "json_object":
            return ""
        case "choices":
            return choice_grammar(_checked_choices(wanted.choices.texts, field))
        case "json_schema":
            return checked_schema(wanted.json_schema, field)
        case _:
            text: str = getattr(wanted, name)
            if not text:
                raise InvalidRequest(f"{field}: empty; send some text", field=field)
            return text


def checked_schema(text: str, field: str) -> str:
    """JSON text that can be a schema: an object or a boolean. Raises InvalidRequest."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field}: is not JSON ({error}); send a JSON schema", field=field) from error
    if not isinstance(schema, (dict, bool)):
        raise InvalidRequest(f"{field}: is a JSON {type(schema).__name__}; send a JSON schema", field=field)
    return text


def _checked_choices(texts: Sequence[str], field: str) -> Sequence[str]:
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise InvalidRequest(f"{field}.texts: {len(texts)} texts; send 1 to {MAX_CHOICES}", field=f"{field}.texts")
    for index, text in enumerate(texts):
        if not text:
            raise InvalidRequest(f"{field}.texts[{index}]: empty; send some text", field=f"{field}.texts[{index}]")
    return texts


def required_calls(tools: ToolUse, tags: ToolTags | None) -> router_pb2.Grammar | None:
    """The grammar of the tool calls that must come; None: none must."""
    if not tools.required:
        return None
    if tags is None:
        raise InvalidRequest("tool_choice: this model has no tokens for tool calls; leave it out", field="tool_choice")
    signatures = [
        ToolSignature(tool.name, json.loads(tool.parameters_json) if tool.parameters_json else None)
        for tool in tools.required
    ]
    text = tool_call_grammar(signatures, tags, max_calls=tools.max_calls)
    return router_pb2.Grammar(kind=router_pb2.Grammar.KIND_EBNF, text=text, after_thinking=True)
