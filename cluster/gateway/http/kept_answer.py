"""KeptAnswer: what one connection gets of a stream that outlives it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import NotReady
from cluster.gateway.http.answer import LAST_WORD_S, error_answer, stream_body, stream_start
from cluster.gateway.http.errors import error_json
from cluster.gateway.http.exchanges import ClientGone, Exchanges
from cluster.gateway.http.forms import data
from cluster.gateway.http.kept import KeptStream, KeptStreams


class KeptAnswer(Response):
    """The events of a kept stream, from one of them on."""

    def __init__(self, streams: KeptStreams, stream: KeptStream, start: int, exchanges: Exchanges) -> None:
        super().__init__()
        self._streams, self._stream, self._start, self._exchanges = streams, stream, start, exchanges
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = self._stream.source.request_id
        self._streams.attached(self._stream)
        try:
            async with self._exchanges.watched(receive):
                await self._send(send, request_id)
            if not self._has_begun:
                raise NotReady("another connection has taken this stream over")
            await send(stream_body(b"", more=False))
        except ClientGone:
            pass
        except Exception as error:
            if not self._has_begun:
                await error_answer(error, request_id)(scope, receive, send)
                return
            async with asyncio.timeout(LAST_WORD_S):
                # Without an id, and not by the stream's own form: for other readers it goes on.
                await send(stream_body(data(error_json(error, request_id)), more=False))
        finally:
            self._streams.left(self._stream)

    async def _send(self, send: Send, request_id: str) -> None:
        async with aclosing(self._stream.read(self._start)) as pieces:
            async for text in pieces:
                if not self._has_begun:
                    self._has_begun = True
                    await send(stream_start(request_id))
                await send(stream_body(text, more=True))
