"""Streams of server-sent events that outlive their connection, for clients that asked for it.

Hop 11 over HTTP. Such a stream is written into a bounded buffer by a task of its own, each event with an id; whoever
comes with `Last-Event-ID` reads on behind it. Without a reader the task goes on for the retention time and is then
cancelled, which frees everything. Bounds: so many streams, so many bytes of each; the oldest events of a stream make
room for new ones, and a reader that needs them has come too late; one that is there is waited for.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from cluster.errors import NotReady, Overloaded
from cluster.gateway.http.answer import Batches
from cluster.gateway.http.errors import StreamGone, error_json
from cluster.gateway.http.forms import Form

_EVENT_END = b"\n\n"


@dataclass(frozen=True, kw_only=True)
class KeepPolicy:
    """What is kept, and how long."""

    retention_s: float
    """Without a reader."""
    max_streams: int
    max_bytes: int
    """Of one stream's events."""


@dataclass(frozen=True)
class StreamSource:
    """What a stream is made of, and who may read it."""

    batches: Callable[[], Batches]
    form: Form
    request_id: str
    tenant: str
    path: str


class KeptStream:
    """One stream and its last events. At most one reader at a time: a newer one takes over."""

    def __init__(self, source: StreamSource, max_bytes: int) -> None:
        self.id = uuid.uuid4().hex
        self.source = source
        self.is_over = False
        self.was_read = False
        """Some of it was given out: a client may know an id of it."""
        self._max_bytes = max_bytes
        self._events: deque[bytes] = deque()
        self._num_dropped = 0
        """Events before the first one that is kept."""
        self._num_bytes = 0
        self._error: Exception | None = None
        """Why it has no events at all."""
        self._changed = asyncio.Event()
        self._reader: object | None = None
        self._num_read = 0
        """Events that the reader has had, or did not ask for."""

    @property
    def has_reader(self) -> bool:
        return self._reader is not None

    async def write(self) -> None:
        """Put the whole stream into the buffer."""
        form, has_begun = self.source.form, False
        try:
            async with aclosing(self.source.batches()) as batches:
                async for events in batches:
                    self._add(form.write(events) if has_begun else form.begin() + form.write(events))
                    has_begun = True
                    await self._taken()
            self._add(form.end())
        except Exception as error:
            if has_begun:
                self._add(form.fail(error_json(error, self.source.request_id)))
            else:
                self._error = error
        finally:
            self.is_over = True
            self._changed.set()

    async def read(self, start: int) -> AsyncGenerator[bytes]:
        """The events from number `start` on, as they come. Raises StreamGone, or what kept it from beginning."""
        self._check_kept(start)
        me = self._reader = object()
        self._num_read = start
        self._changed.set()
        try:
            while self._reader is me:
                if self._error is not None:
                    raise self._error
                pieces = [self._events[index] for index in range(self._num_read - self._num_dropped, len(self._events))]
                if pieces:
                    self.was_read = True
                    yield b"".join(pieces)
                    if self._reader is me:
                        self._num_read += len(pieces)
                        self._changed.set()
                elif self.is_over:
                    return
                else:
                    await self._change()
        finally:
            if self._reader is me:
                self._reader = None
                self._changed.set()

    async def _taken(self) -> None:
        """Wait for the reader, where there is one: what piles up meanwhile is the core's to bound."""
        while self._reader is not None and self._num_read < self._num_dropped + len(self._events):
            await self._change()

    async def _change(self) -> None:
        """Until something is written or read, or a reader comes or goes."""
        changed = self._changed
        await changed.wait()
        if self._changed is changed:
            self._changed = asyncio.Event()

    def _check_kept(self, start: int) -> None:
        """Raises StreamGone."""
        if start < self._num_dropped:
            raise StreamGone(
                f"events before {self.id}:{self._num_dropped} are not kept any longer; send the request again",
                field="last-event-id",
            )
        if start > self._num_dropped + len(self._events):
            raise StreamGone(f"{self.id}:{start - 1} has not come yet; send an id that has", field="last-event-id")

    def _add(self, text: bytes) -> None:
        for event in text.split(_EVENT_END)[:-1]:
            number = self._num_dropped + len(self._events)
            numbered = b"id: %s:%d\n%s%s" % (self.id.encode(), number, event, _EVENT_END)
            self._events.append(numbered)
            self._num_bytes += len(numbered)
        while self._num_bytes > self._max_bytes and len(self._events) > 1:
            if self._reader is not None and self._num_dropped >= self._num_read:
                break  # the reader is about to take them
            self._num_bytes -= len(self._events.popleft())
            self._num_dropped += 1
        self._changed.set()


class KeptStreams:
    """All of one gateway; owns the tasks that write them."""

    def __init__(self, policy: KeepPolicy) -> None:
        self._policy = policy
        self._streams: dict[str, KeptStream] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._is_closed = False

    def open(self, source: StreamSource) -> KeptStream:
        """Begin a stream; read it at once. Raises Overloaded, NotReady."""
        if self._is_closed:
            raise NotReady("this server is shutting down; send the request to another one")
        if len(self._streams) >= self._policy.max_streams and not self._forget_one():
            raise Overloaded(
                f"{len(self._streams)} resumable streams are kept, which is the limit; "
                "try again later, or leave out stream_options.resumable"
            )
        stream = KeptStream(source, self._policy.max_bytes)
        self._streams[stream.id] = stream
        self._tasks[stream.id] = asyncio.create_task(stream.write(), name=f"kept stream {stream.id}")
        return stream

    def find(self, event_id: str, tenant: str, path: str) -> tuple[KeptStream, int]:
        """The stream of an event, and the number of the next one. Raises StreamGone."""
        stream_id, _, number = event_id.rpartition(":")
        stream = self._streams.get(stream_id)
        # Of others' streams not even that they exist is told.
        if stream is None or (stream.source.tenant, stream.source.path) != (tenant, path) or not _is_number(number):
            raise StreamGone(
                "last-event-id: no stream is kept under it, here and for this path; send the request again",
                field="last-event-id",
            )
        return stream, int(number) + 1

    def attached(self, stream: KeptStream) -> None:
        """It has a reader."""
        if (timer := self._timers.pop(stream.id, None)) is not None:
            timer.cancel()

    def left(self, stream: KeptStream) -> None:
        """Its reader has gone; unless there is another one it has so long to come back."""
        if stream.has_reader or stream.id not in self._streams:
            return
        if not stream.was_read:
            # Nobody knows an id of it.
            self._forget(stream.id)
            return
        self.attached(stream)
        later = asyncio.get_running_loop().call_later
        self._timers[stream.id] = later(self._policy.retention_s, self._expire, stream)

    async def close(self) -> None:
        """Cancel all."""
        self._is_closed = True
        tasks = list(self._tasks.values())
        for stream_id in list(self._streams):
            self._forget(stream_id)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget_one(self) -> bool:
        """Make room: the oldest that is over and has no reader goes first."""
        for stream in self._streams.values():
            if stream.is_over and not stream.has_reader:
                self._forget(stream.id)
                return True
        return False

    def _expire(self, stream: KeptStream) -> None:
        del self._timers[stream.id]
        # Who has just come back may have met the one before on its way out.
        if not stream.has_reader:
            self._forget(stream.id)

    def _forget(self, stream_id: str) -> None:
        del self._streams[stream_id]
        if (timer := self._timers.pop(stream_id, None)) is not None:
            timer.cancel()
        self._tasks.pop(stream_id).cancel()


def _is_number(text: str) -> bool:
    return 0 < len(text) <= 18 and text.isascii() and text.isdigit()
