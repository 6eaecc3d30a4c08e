"""The grammar of an answer that must call a tool: Hermes markup around arguments that match the tool's schema.

Pure text, in llguidance's form of EBNF: the tags are tokens by their ids, so that the calls are also read as such.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.text.answer import ToolTags

_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
# As chat templates write calls that were made. With free white space small models lose their way.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class ToolSignature:
    """What a call of a tool looks like."""

    name: str
    schema: dict[str, Any] | None
    """JSON schema of the arguments; None: it takes none."""


def tool_call_grammar(tools: Sequence[ToolSignature], tags: ToolTags, *, max_calls: int | None) -> str:
    """EBNF of at least one call of one of these tools, and at most one where `max_calls` is 1."""
    assert max_calls in (None, 1), f"{max_calls} calls cannot be told from more"
    start = "start: call" if max_calls == 1 else 'start: call ("\\n" call)*'
    bodies = " | ".join(f"body_{index}" for index in range(len(tools)))
    lines = [start, f'call: <[{tags.open_id}]> "\\n" ({bodies}) "\\n" <[{tags.close_id}]>']
    for index, tool in enumerate(tools):
        head = '{"name": ' + json.dumps(tool.name, ensure_ascii=False) + ', "arguments": '
        lines.append(f'body_{index}: {json.dumps(head)} arguments_{index} "}}"')
        lines.append(f"arguments_{index}: %json {json.dumps(_schema(tool))}")
    return "\n".join(lines) + "\n"


def choice_grammar(texts: Sequence[str]) -> str:
    """EBNF of one of these texts."""
    return "start: " + " | ".join(json.dumps(text) for text in texts) + "\n"


def _schema(tool: ToolSignature) -> dict[str, Any]:
    """Of an object, closed where the tool names its properties and does not say whether there may be others."""
    schema = _NO_ARGUMENTS if tool.schema is None else tool.schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {"x-guidance": _JSON_OPTIONS, "type": "object", **closed, **schema}
