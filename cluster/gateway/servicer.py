"""GenerationService: the client's calls, each a few lines over the core.

Hops 1 and 11. Checks the request, submits it, writes the events as they come, and turns whatever ends it into a status.
A handler that stops, for whatever reason, releases its request: the Router frees its blocks before the next plan.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import grpc.aio

from cluster.errors import NotReady, Overloaded
from cluster.gateway.generation import Generation
from cluster.gateway.mailbox import Mailbox
from cluster.gateway.requests import PreparedRequest, new_request_id, prepare
from cluster.gateway.router_link import RouterLink
from cluster.gateway.sampling_options import default_options
from cluster.gateway.served_model import ServedModel
from cluster.gateway.status import abort, status_code
from cluster.metrics import GatewayMetrics, RequestTimer
from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceServicer

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

# Template and encoding of a larger request take over a millisecond or so: they run in a thread, the streams go on.
LARGE_REQUEST_BYTES = 16 * 1024
DRAINING = "this server is shutting down"


class GenerationServicer(GenerationServiceServicer):
    """What clients talk to."""

    def __init__(self, model: ServedModel, link: RouterLink, metrics: GatewayMetrics, *, max_streams: int) -> None:
        self.num_streams = 0
        self._model = model
        self._link = link
        self._metrics = metrics
        self._max_streams = max_streams
        self._start_s = time.monotonic()
        self.is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def refuse_new(self) -> None:
        """Refuse new requests from now on; open streams go on."""
        self.is_draining = True

    async def wait_until_idle(self, timeout_s: float) -> int:
        """Wait until no stream is open, at most `timeout_s`. Returns how many still are."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("%d streams are still open after %g s", self.num_streams, timeout_s)
        return self.num_streams

    async def Generate(  # type: ignore[override]  # written with context.write: a generator would not see the cancellation
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Stream one generation."""
        request_id = request.request_id = request.request_id or new_request_id()
        timer = RequestTimer(self._metrics)
        try:
            with self._stream_slot():
                prepared = await self._prepare(request)
                await self._stream(prepared, context, timer)
        except asyncio.CancelledError:
            timer.on_failed(grpc.StatusCode.CANCELLED.name)
            raise
        except Exception as error:
            timer.on_failed(status_code(error).name)
            await abort(context, error, request_id)

    async def ListModels(self, _request: pb.ListModelsRequest, _context: Context) -> pb.ListModelsResponse:
        """The one model that this server has."""
        model = self._model_now
        listed = pb.Model(
            name=model.name,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            defaults=default_options(model.defaults),
        )
        return pb.ListModelsResponse(models=[listed])

    async def GetServerInfo(self, _request: pb.GetServerInfoRequest, _context: Context) -> pb.GetServerInfoResponse:
        """How this server and its Router are now."""
        state = await self._link.describe()
        return pb.GetServerInfoResponse(
            version=version("mull"),
            ready=state.ready and not self.is_draining,
            reason=DRAINING if self.is_draining else state.reason,
            uptime_seconds=time.monotonic() - self._start_s,
            num_streams=self.num_streams,
            routers=[state.description] if state.description is not None else [],
        )

    @contextmanager
    def _stream_slot(self) -> Iterator[None]:
        if self.is_draining:
            raise NotReady(f"{DRAINING}; send the request to another server")
        if self.num_streams >= self._max_streams:
            raise Overloaded(f"{self.num_streams} streams are open, the limit is {self._max_streams}; try again later")
        self.num_streams += 1
        self._idle.clear()
        self._metrics.streams_open.set(self.num_streams)
        try:
            yield
        finally:
            self.num_streams -= 1
            if self.num_streams == 0:
                self._idle.set()
            self._metrics.streams_open.set(self.num_streams)

    @property
    def _model_now(self) -> ServedModel:
        """The model within the context that the Router has room for."""
        limit = self._link.context_limit
        return self._model if limit is None else self._model.limited_to(limit)

    async def _prepare(self, request: pb.GenerateRequest) -> PreparedRequest:
        if request.ByteSize() > LARGE_REQUEST_BYTES:
            return await asyncio.to_thread(prepare, request, self._model_now)
        return prepare(request, self._model_now)

    async def _stream(self, request: PreparedRequest, context: Context, timer: RequestTimer) -> None:
        mailbox = self._link.submit(request)
        try:
            with _interrupted_on_overflow(mailbox):
                await _write_events(Generation(request, self._model), mailbox, context, timer)
        finally:
            self._link.release(mailbox)


async def _write_events(generation: Generation, mailbox: Mailbox, context: Context, timer: RequestTimer) -> None:
    while generation.finished is None:
        delivery = await mailbox.next()
        events = generation.accept(delivery)
        if delivery.cached_tokens is not None:
            timer.on_admitted(generation.num_prompt_tokens, delivery.cached_tokens)
        timer.on_tokens(generation.num_thinking_tokens, generation.num_answer_tokens)
        for event in events:
            await context.write(event)
    ended = generation.thinking_ended
    timer.on_finished(
        finish_reason=_label(pb.Finished.Reason.Name(generation.finished.reason)),
        phase=generation.phase.value,
        thinking_ended=None if ended is None else _label(pb.ThinkingEnded.Reason.Name(ended.reason)),
    )


def _label(enum_name: str) -> str:
    """REASON_STOP → stop."""
    return enum_name.removeprefix("REASON_").lower()


@contextmanager
def _interrupted_on_overflow(mailbox: Mailbox) -> Iterator[None]:
    """Inside, a mailbox that passes its bound interrupts this task, which may hang in a write that nobody reads."""
    task = asyncio.current_task()
    assert task is not None
    mailbox.on_overflow = task.cancel
    try:
        yield
    except asyncio.CancelledError:
        if mailbox.error is None or task.uncancel() > 0:
            # It was the client, or the server's end, that cancelled.
            raise
        raise mailbox.error from None
    finally:
        mailbox.on_overflow = None
