"""Reads one tool call as it is written, `{"name": …, "arguments": {…}}`, piece by piece.

Hop 11, pure: text in, what became known out. The pieces of the arguments together are exactly their JSON text. What
the model wrote is judged at the end as a whole; a call that cannot be read is the reader's text, and whoever asked
passes that on. Other orders of the keys are read too, at the end. Knows nothing of tokens and tags.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

TOOL_CALL_START = "<tool_call>"
TOOL_CALL_END = "</tool_call>"

_B = r"[ \t\n\r]*"
_HEADER = re.compile(rf'{_B}\{{{_B}"name"{_B}:{_B}("(?:[^"\\]|\\.)*"){_B},{_B}"arguments"{_B}:{_B}(?=\{{)')
# No arguments at all: some models write calls of tools that take none so.
_NO_ARGUMENTS = "{}"
_LAST = "}"
_BLANKS = " \t\n\r"


@dataclass(frozen=True, slots=True)
class CallError:
    """Why a call cannot be read, for a human."""

    reason: str


class ToolCallReader:
    """One call."""

    def __init__(self) -> None:
        self.name: str | None = None
        """Known from the push on in which the arguments begin."""
        self._pieces: list[str] = []
        self._header = ""
        self._arguments: list[str] = []
        self._end = JsonEnd()

    @property
    def text(self) -> str:
        """All that was written between the tags."""
        return "".join(self._pieces)

    def push(self, text: str) -> str:
        """The next piece of the arguments; empty while there is none."""
        self._pieces.append(text)
        if self.name is not None:
            return self._take(text)
        self._header += text
        header = _HEADER.match(self._header)
        if header is None or (name := _name(header.group(1))) is None:
            return ""
        self.name = name
        return self._take(self._header[header.end() :])

    def finish(self) -> str | CallError:
        """The call is over: the rest of its arguments, or why it cannot be read. `name` is known unless it cannot."""
        try:
            members = _members(self.text)
        except (ValueError, RecursionError) as error:
            return CallError(f"it is not a JSON object ({error})")
        name, arguments = members.get("name", ""), members.get("arguments", _NO_ARGUMENTS)
        known = _name(name)
        if known is None:
            return CallError("it has no name")
        if not arguments.startswith("{"):
            return CallError("its arguments are not an object")
        if self.name is None:
            self.name = known
            return arguments
        assert (self.name, "".join(self._arguments)) == (known, arguments), (
            "the header's and the whole's reading differ"
        )
        return _LAST

    def _take(self, text: str) -> str:
        """Without the last bracket: it comes when the whole was judged, so no unreadable call has whole arguments."""
        piece = text[: self._end.feed(text)]
        if piece:
            self._arguments.append(piece)
        return piece.removesuffix(_LAST) if self._end.is_over else piece


class JsonEnd:
    """Finds where a JSON object or array ends, brackets and strings counted; its syntax is not checked."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self.is_over = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to it."""
        if self.is_over:
            return 0
        for index, character in enumerate(text):
            if self._in_string:
                self._in_text(character)
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_over = True
                    return index + 1
        return len(text)

    def _in_text(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._in_string = False


def _members(text: str) -> dict[str, str]:
    """The keys of the JSON object that `text` is, each with its value's text as written. Raises ValueError."""
    members: dict[str, str] = {}
    position = _expect(text, 0, "{")
    while not (members == {} and text[position : position + 1] == "}"):
        key, position = _DECODER.raw_decode(text, position)
        if not isinstance(key, str) or key in members:
            raise ValueError(f"{key!r} is no key, or is there twice")
        start = _expect(text, position, ":")
        _, position = _DECODER.raw_decode(text, start)
        members[key] = text[start:position]
        position = _skip_blanks(text, position)
        if text[position : position + 1] != ",":
            break
        position = _expect(text, position, ",")
    if _expect(text, position, "}") != len(text):
        raise ValueError("something follows its end")
    return members


def _expect(text: str, position: int, character: str) -> int:
    """Past the next `character`, blanks around it aside. Raises ValueError where something else comes."""
    position = _skip_blanks(text, position)
    if text[position : position + 1] != character:
        raise ValueError(f"expected {character} at character {position}")
    return _skip_blanks(text, position + 1)


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in _BLANKS:
        position += 1
    return position


def _name(text: str) -> str | None:
    """The name that a JSON text holds; None where it is none that can be sent."""
    try:
        value: Any = json.loads(text)
        if isinstance(value, str) and value.encode():
            return value
    except ValueError:  # UnicodeEncodeError is one: half of a surrogate pair
        pass
    return None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
