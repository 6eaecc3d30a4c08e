"""The answer to POST /v1/responses: items in one document, or the named events that OpenAI's clients expect."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from cluster.gateway.http.collected import Collector, token_logprobs
from cluster.gateway.http.fields import Fields
from cluster.gateway.http.forms import named
from cluster.gateway.http.parts import Json, TokenBytes, logprobs_json
from cluster.gateway.http.response_items import Event, FunctionCallItem, Item, MessageItem, ReasoningItem
from mull.v1 import generation_pb2 as pb

_ECHOED: Json = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "user": None,
}
"""What a response repeats of its request, and what it says where the request said nothing."""


class ResponseForm:
    """The answer to one response request."""

    def __init__(self, response_id: str, model: str, token_bytes: TokenBytes, body: Fields) -> None:
        self._id = response_id
        self._token_bytes = token_bytes
        self._about: Json = {
            "id": f"resp_{response_id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "previous_response_id": None,
            "truncation": "disabled",
            "reasoning": body.values.get("reasoning") or {"effort": None, "summary": None},
            "store": False,
            **{name: body.values[name] if body.has(name) else value for name, value in _ECHOED.items()},
        }
        self._items: list[Item] = []
        self._ended: list[Json] = []
        self._finished: pb.Finished | None = None
        self._num_events = 0

    def document(self, collected: Collector) -> Json:
        for choice in collected.choices:
            if thoughts := choice.thinking_text:
                list(self._reasoning(thoughts))
            if choice.answer_text or not choice.tool_calls:
                logprobs = logprobs_json(choice.answer_logprobs, [], self._token_bytes)
                list(self._message(choice.answer_text, logprobs["content"] if logprobs else []))
            for call in choice.tool_calls:
                list(self._open(FunctionCallItem(len(self._items), f"fc_{call.id}", call.id, call.name)))
                list(self._arguments(call.arguments))
            self._finished = choice.finished
        list(self._close_last(self._status))
        return self._response()

    def begin(self) -> bytes:
        response = {**self._about, "status": "in_progress", "output": [], "usage": None, "error": None}
        response["incomplete_details"] = None
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._named(kind, {"response": response}) for kind in kinds)

    def write(self, events: Sequence[pb.GenerateEvent]) -> bytes:
        return b"".join(self._named(kind, body) for event in events for kind, body in self._events(event))

    def end(self) -> bytes:
        return self._named(f"response.{self._status}", {"response": self._response()})

    def fail(self, error: Json) -> bytes:
        said = error["error"]
        failed = {**self._about, "status": "failed", "output": self._ended, "usage": None, "incomplete_details": None}
        failed["error"] = {"code": "server_error", "message": said["message"]}
        about = {"code": said["code"] or said["type"], "message": said["message"], "param": said["param"]}
        return self._named("response.failed", {"response": failed}) + self._named("error", about)

    @property
    def _status(self) -> str:
        cut = self._finished is not None and self._finished.reason == pb.Finished.REASON_LENGTH
        return "incomplete" if cut else "completed"

    def _events(self, event: pb.GenerateEvent) -> Iterator[Event]:
        match event.WhichOneof("event"):
            case "thinking_delta" if event.thinking_delta.text:
                yield from self._reasoning(event.thinking_delta.text)
            case "answer_delta" if event.answer_delta.text:
                logprobs = logprobs_json(token_logprobs(event.answer_delta), [], self._token_bytes)
                yield from self._message(event.answer_delta.text, logprobs["content"] if logprobs else [])
            case "tool_call_start":
                start = event.tool_call_start
                yield from self._open(FunctionCallItem(len(self._items), f"fc_{start.id}", start.id, start.name))
            case "tool_call_arguments_delta" if event.tool_call_arguments_delta.arguments_json:
                yield from self._arguments(event.tool_call_arguments_delta.arguments_json)
            case "finished":
                self._finished = event.finished
                yield from self._close_last(self._status)

    def _reasoning(self, text: str) -> Iterator[Event]:
        if not (self._items and isinstance(self._items[-1], ReasoningItem)):
            yield from self._open(ReasoningItem(len(self._items), f"rs_{self._id}_{len(self._items)}"))
        item = self._items[-1]
        assert isinstance(item, ReasoningItem)
        yield from item.grow(text)

    def _message(self, text: str, logprobs: list[Json]) -> Iterator[Event]:
        if not (self._items and isinstance(self._items[-1], MessageItem)):
            yield from self._open(MessageItem(len(self._items), f"msg_{self._id}_{len(self._items)}"))
        item = self._items[-1]
        assert isinstance(item, MessageItem)
        yield from item.grow(text, logprobs)

    def _arguments(self, text: str) -> Iterator[Event]:
        item = self._items[-1]
        assert isinstance(item, FunctionCallItem), "arguments come after the start of their call"
        yield from item.grow(text)

    def _open(self, item: Item) -> Iterator[Event]:
        """Every item but the last one is complete, whatever ends the response."""
        yield from self._close_last("completed")
        self._items.append(item)
        yield from item.begin()

    def _close_last(self, status: str) -> Iterator[Event]:
        if len(self._ended) < len(self._items):
            item = self._items[-1]
            self._ended.append(item.document(status))
            yield from item.end(status)

    def _response(self) -> Json:
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        usage = self._finished.usage if self._finished is not None else pb.Usage()
        return {
            **self._about,
            "status": self._status,
            "output": self._ended,
            "usage": _usage_json(usage),
            "error": None,
            "incomplete_details": cut,
        }

    def _named(self, kind: str, body: Json) -> bytes:
        number = self._num_events
        self._num_events += 1
        return named(kind, {"type": kind, "sequence_number": number, **body})


def _usage_json(usage: pb.Usage) -> Json:
    output_tokens = usage.thinking_tokens + usage.answer_tokens
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
        "total_tokens": usage.prompt_tokens + output_tokens,
    }
