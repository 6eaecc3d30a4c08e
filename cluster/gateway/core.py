"""GenerationCore: what every front door of a gateway shares, gRPC and HTTP alike.

Hops 1 and 11. Checks a request, submits it, and yields the events as they come. Whatever ends a stream early releases
its request: the Router frees its blocks before the next plan. Knows nothing of calls, headers or status lines.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

import grpc

from cluster.errors import InvalidRequest, NotReady, Overloaded
from cluster.gateway.conversations import render_conversation
from cluster.gateway.generation import Generation
from cluster.gateway.mailbox import Mailbox
from cluster.gateway.requests import PreparedRequest, new_request_id, prepare
from cluster.gateway.router_link import RouterLink
from cluster.gateway.served_model import ServedModel
from cluster.gateway.status import status_code
from cluster.metrics import GatewayMetrics, RequestTimer
from mull.v1 import generation_pb2 as pb

logger = logging.getLogger(__name__)

# Template and encoding of a larger request take over a millisecond or so: they run in a thread, the streams go on.
LARGE_REQUEST_BYTES = 16 * 1024
DRAINING = "this server is shutting down"
SUPPORTED_FIELDS = frozenset(
    [
        "model",
        "request_id",
        "conversation",
        "raw_prompt",
        "token_ids",
        "sampling",
        "max_tokens",
        "metadata",
        "raw_tool_calls",
        "parallel_tool_calls",
    ]
)
SUPPORTED_SAMPLING = frozenset(
    [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "logprobs",
    ]
)


class GenerationCore:
    """Requests in, events out."""

    def __init__(self, model: ServedModel, link: RouterLink, metrics: GatewayMetrics, *, max_streams: int) -> None:
        self.num_streams = 0
        self.is_draining = False
        self._model = model
        self._link = link
        self._metrics = metrics
        self._max_streams = max_streams
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def model(self) -> ServedModel:
        """The model within the context that the Router has room for."""
        limit = self._link.context_limit
        return self._model if limit is None else self._model.limited_to(limit)

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

    async def stream(self, request: pb.GenerateRequest) -> AsyncGenerator[list[pb.GenerateEvent]]:
        """The events of a request, in batches as they come; close it to cancel the request.

        Raises RequestError, Overloaded, NotReady and SlowReader; the last from closing it where the reader hung in a
        write of its own, which is then cancelled.
        """
        timer = RequestTimer(self._metrics)
        try:
            with self._stream_slot():
                prepared = await self._prepare(request)
                mailbox = self._link.submit(prepared)
                try:
                    with _interrupted_on_overflow(mailbox):
                        generation = Generation(prepared, self._model)
                        while generation.finished is None:
                            yield await _next_events(generation, mailbox, timer)
                finally:
                    self._link.release(mailbox)
        except (asyncio.CancelledError, GeneratorExit):
            timer.on_failed(grpc.StatusCode.CANCELLED.name)
            raise
        except Exception as error:
            timer.on_failed(status_code(error).name)
            raise

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        """Token ids of a text or of a conversation, as `stream` would encode it. Raises RequestError."""
        model = self.model
        text = request.text
        if request.HasField("conversation"):
            text = render_conversation(request.conversation, model.tokenizer)
        ids = model.tokenizer.encode(text)
        texts = [model.tokenizer.token_bytes[id_].decode("utf-8", "replace") for id_ in ids]
        return pb.TokenizeResponse(token_ids=ids, max_model_len=model.max_model_len, texts=texts)

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """The text of token ids. Raises RequestError."""
        model = self.model
        for index, id_ in enumerate(request.token_ids):
            if id_ >= model.vocab_size:
                field = f"token_ids[{index}]"
                raise InvalidRequest(f"{field}: {id_} is no token; the vocabulary has {model.vocab_size}", field=field)
        return pb.DetokenizeResponse(text=model.tokenizer.decode(request.token_ids))

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

    async def _prepare(self, request: pb.GenerateRequest) -> PreparedRequest:
        request.request_id = request.request_id or new_request_id()
        _refuse_unsupported(request)
        if request.ByteSize() > LARGE_REQUEST_BYTES:
            return await asyncio.to_thread(prepare, request, self.model)
        return prepare(request, self.model)


def _refuse_unsupported(request: pb.GenerateRequest) -> None:
    """A field that is not implemented is refused, never ignored."""
    fields = [field.name for field, _ in request.ListFields() if field.name not in SUPPORTED_FIELDS]
    fields += [f"sampling.{f.name}" for f, _ in request.sampling.ListFields() if f.name not in SUPPORTED_SAMPLING]
    if fields:
        raise InvalidRequest(f"{fields[0]}: not supported yet; leave it out", field=fields[0])


async def _next_events(generation: Generation, mailbox: Mailbox, timer: RequestTimer) -> list[pb.GenerateEvent]:
    delivery = await mailbox.next()
    events = generation.accept(delivery)
    if delivery.cached_tokens is not None:
        timer.on_admitted(generation.num_prompt_tokens, delivery.cached_tokens)
    timer.on_tokens(generation.num_thinking_tokens, generation.num_answer_tokens)
    if generation.finished is not None:
        ended = generation.thinking_ended
        timer.on_finished(
            finish_reason=_label(pb.Finished.Reason.Name(generation.finished.reason)),
            phase=generation.phase.value,
            thinking_ended=None if ended is None else _label(pb.ThinkingEnded.Reason.Name(ended.reason)),
        )
    return events


def _label(enum_name: str) -> str:
    """REASON_STOP → stop."""
    return enum_name.removeprefix("REASON_").lower()


@contextmanager
def _interrupted_on_overflow(mailbox: Mailbox) -> Iterator[None]:
    """Inside, a mailbox that passes its bound interrupts the reader's task, which may hang in a write."""
    task = asyncio.current_task()
    assert task is not None
    mailbox.on_overflow = task.cancel
    try:
        yield
    except (asyncio.CancelledError, GeneratorExit):
        if mailbox.error is None or task.uncancel() > 0:
            # It was the client, or the server's end, that cancelled.
            raise
        raise mailbox.error from None
    finally:
        mailbox.on_overflow = None
