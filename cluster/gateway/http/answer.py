"""GenerationAnswer: one request's events, written as they come or all at once.

Hop 11 over HTTP. Nothing is sent before the first events are here, so that a request that is refused gets its own
status. A write waits where the client does not read; what piles up meanwhile is bounded by the core.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from cluster.gateway.http.collected import Collector
from cluster.gateway.http.errors import error_headers, error_json, http_status
from cluster.gateway.http.exchanges import ClientGone, Exchanges
from cluster.gateway.http.forms import Form
from cluster.gateway.http.parts import Json
from mull.v1 import generation_pb2 as pb

Batches = AsyncGenerator[Sequence[pb.GenerateEvent], None]
LAST_WORD_S = 1.0
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would collect the stream otherwise.
    (b"x-accel-buffering", b"no"),
]


class JsonAnswer(Response):
    """A JSON document."""

    media_type = "application/json"

    def render(self, content: Json) -> bytes:
        return msgspec.json.encode(content)


def error_answer(error: Exception, request_id: str) -> JsonAnswer:
    """An error, with its status, in OpenAI's shape."""
    row = http_status(error)
    headers = {**error_headers(error), "x-request-id": request_id}
    return JsonAnswer(error_json(error, request_id), row.status, headers)


class WholeAnswer(Response):
    """The answer in one document, when all is done."""

    def __init__(self, batches: Callable[[], Batches], form: Form, exchanges: Exchanges, request_id: str) -> None:
        super().__init__()
        self._batches, self._form, self._exchanges, self._request_id = batches, form, exchanges, request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._exchanges.watched(receive):
                collected = await self._collected()
            document = self._form.document(collected)
            answer = JsonAnswer(document, headers={"x-request-id": self._request_id})
        except ClientGone:
            return
        except Exception as error:
            answer = error_answer(error, self._request_id)
        await answer(scope, receive, send)

    async def _collected(self) -> Collector:
        collector = Collector()
        async with aclosing(self._batches()) as batches:
            async for events in batches:
                collector.accept(events)
        return collector


class StreamedAnswer(Response):
    """The answer as server-sent events."""

    def __init__(self, batches: Callable[[], Batches], form: Form, exchanges: Exchanges, request_id: str) -> None:
        super().__init__()
        self._batches, self._form, self._exchanges, self._request_id = batches, form, exchanges, request_id
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._exchanges.watched(receive):
                await self._stream(send)
            await send(stream_body(self._form.end(), more=False))
        except ClientGone:
            return
        except Exception as error:
            if not self._has_begun:
                await error_answer(error, self._request_id)(scope, receive, send)
                return
            # A client that does not read cannot be told either: its connection closes without a last word.
            async with asyncio.timeout(LAST_WORD_S):
                await send(stream_body(self._form.fail(error_json(error, self._request_id)), more=False))

    async def _stream(self, send: Send) -> None:
        form = self._form
        async with aclosing(self._batches()) as batches:
            async for events in batches:
                text = b""
                if not self._has_begun:
                    await self._begin(send)
                    text = form.begin()
                if text := text + form.write(events):
                    await send(stream_body(text, more=True))

    async def _begin(self, send: Send) -> None:
        self._has_begun = True
        await send(stream_start(self._request_id))


def stream_start(request_id: str) -> Message:
    """The head of a stream."""
    headers = [*_STREAM_HEADERS, (b"x-request-id", request_id.encode())]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def stream_body(text: bytes, *, more: bool) -> Message:
    """The next bytes of a stream."""
    return {"type": "http.response.body", "body": text, "more_body": more}
