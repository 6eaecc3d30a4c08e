"""The output of a response as OpenAI's items: reasoning, a message, function calls; each with its events.

An item knows how to begin, grow and end; ResponseForm says when.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

Json = dict[str, Any]
Event = tuple[str, Json]
"""Kind and body, without the sequence number."""


class Item(Protocol):
    """One item of the output, as it grows."""

    def begin(self) -> Iterator[Event]: ...

    def end(self, status: str) -> Iterator[Event]: ...

    def document(self, status: str) -> Json: ...


class ReasoningItem:
    """The thoughts."""

    def __init__(self, index: int, item_id: str) -> None:
        self._at: Json = {"item_id": item_id, "output_index": index}
        self._id, self._index = item_id, index
        self._texts: list[str] = []

    def begin(self) -> Iterator[Event]:
        yield "response.output_item.added", {"output_index": self._index, "item": self.document("in_progress")}
        part = {"type": "reasoning_text", "text": ""}
        yield "response.content_part.added", {**self._at, "content_index": 0, "part": part}

    def grow(self, text: str) -> Iterator[Event]:
        self._texts.append(text)
        yield "response.reasoning_text.delta", {**self._at, "content_index": 0, "delta": text}

    def end(self, status: str) -> Iterator[Event]:
        at = {**self._at, "content_index": 0}
        yield "response.reasoning_text.done", {**at, "text": self._text}
        yield "response.content_part.done", {**at, "part": {"type": "reasoning_text", "text": self._text}}
        yield "response.output_item.done", {"output_index": self._index, "item": self.document(status)}

    def document(self, status: str) -> Json:
        content = [{"type": "reasoning_text", "text": self._text}] if self._texts else []
        return {"type": "reasoning", "id": self._id, "summary": [], "content": content, "status": status}

    @property
    def _text(self) -> str:
        return "".join(self._texts)


class MessageItem:
    """The answer."""

    def __init__(self, index: int, item_id: str) -> None:
        self._at: Json = {"item_id": item_id, "output_index": index, "content_index": 0}
        self._id, self._index = item_id, index
        self._texts: list[str] = []
        self._logprobs: list[Json] = []

    def begin(self) -> Iterator[Event]:
        empty = {**self.document("in_progress"), "content": []}
        yield "response.output_item.added", {"output_index": self._index, "item": empty}
        yield "response.content_part.added", {**self._at, "part": self._part()}

    def grow(self, text: str, logprobs: list[Json]) -> Iterator[Event]:
        self._texts.append(text)
        self._logprobs += logprobs
        yield "response.output_text.delta", {**self._at, "delta": text, "logprobs": logprobs}

    def end(self, status: str) -> Iterator[Event]:
        part = self._part()
        yield "response.output_text.done", {**self._at, "text": part["text"], "logprobs": part["logprobs"]}
        yield "response.content_part.done", {**self._at, "part": part}
        yield "response.output_item.done", {"output_index": self._index, "item": self.document(status)}

    def document(self, status: str) -> Json:
        return {"type": "message", "id": self._id, "role": "assistant", "content": [self._part()], "status": status}

    def _part(self) -> Json:
        text = "".join(self._texts)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(self._logprobs)}


class FunctionCallItem:
    """One tool call."""

    def __init__(self, index: int, item_id: str, call_id: str, name: str) -> None:
        self._at: Json = {"item_id": item_id, "output_index": index}
        self._id, self._index = item_id, index
        self._call_id, self._name = call_id, name
        self._arguments: list[str] = []

    def begin(self) -> Iterator[Event]:
        yield "response.output_item.added", {"output_index": self._index, "item": self.document("in_progress")}

    def grow(self, arguments: str) -> Iterator[Event]:
        self._arguments.append(arguments)
        yield "response.function_call_arguments.delta", {**self._at, "delta": arguments}

    def end(self, status: str) -> Iterator[Event]:
        arguments = "".join(self._arguments)
        yield "response.function_call_arguments.done", {**self._at, "name": self._name, "arguments": arguments}
        yield "response.output_item.done", {"output_index": self._index, "item": self.document(status)}

    def document(self, status: str) -> Json:
        return {
            "type": "function_call",
            "id": self._id,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
            "status": status,
        }
