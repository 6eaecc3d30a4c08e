"""GenerationCore: what the gateway does with a request, whatever protocol it came by.

Between hops 1 and 11: checks the request, submits its generations, gives out their events as they come, and cancels
what is left when the consumer stops or the deadline passes. Knows neither gRPC calls nor HTTP; both are thin over it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

from cluster.errors import NotReady, Overloaded
from cluster.gateway.access import Caller
from cluster.gateway.budgets import RunningBudgets
from cluster.gateway.conversations import render_conversation
from cluster.gateway.generation import Generation
from cluster.gateway.grammar_check import GrammarCheck, compiled
from cluster.gateway.interruption import Interruption
from cluster.gateway.mailbox import Mailbox, wait_for_news
from cluster.gateway.request_bounds import check_conversation_bounds
from cluster.gateway.requests import PreparedRequest, check_model, new_request_id, prepare
from cluster.gateway.router_link import RouterLink
from cluster.gateway.sampling_options import default_options
from cluster.gateway.served_model import ServedModel
from cluster.gateway.status import status_code
from cluster.gateway.stopping import check_vocabulary
from cluster.metrics import GatewayMetrics, RequestTimer
from mull.v1 import generation_pb2 as pb

logger = logging.getLogger(__name__)

# Template and encoding of a larger request take over a millisecond or so: they run in a thread, the streams go on.
LARGE_REQUEST_BYTES = 16 * 1024
DRAINING = "this server is shutting down"


@dataclass
class _Choice:
    """One of a request's generations, while it runs."""

    generation: Generation
    mailbox: Mailbox
    timer: RequestTimer


class GenerationCore:
    """The service behind every protocol."""

    def __init__(
        self,
        model: ServedModel,
        link: RouterLink,
        metrics: GatewayMetrics,
        *,
        max_streams: int,
        check_grammar: GrammarCheck = compiled,
    ) -> None:
        self.num_streams = 0
        self.is_draining = False
        self.http_port = 0
        """Where this server answers HTTP, for those who ask by gRPC; 0: it does not."""
        self.budgets = RunningBudgets(link)
        self._model = model
        self._link = link
        self._metrics = metrics
        self._max_streams = max_streams
        self._check_grammar = check_grammar
        self._start_s = time.monotonic()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def model(self) -> ServedModel:
        """The model within the context that the Router has room for."""
        limit = self._link.context_limit
        return self._model if limit is None else self._model.limited_to(limit)

    async def stream(self, request: pb.GenerateRequest, caller: Caller) -> AsyncGenerator[list[pb.GenerateEvent]]:
        """The events of all generations of a request, in batches as they come; gives it a request id where it has none.

        Raises RequestError, Overloaded, NotReady, SlowReader, DeadlinePassed or EngineError. Close it
        (`contextlib.aclosing`) in the task that iterates: what has not finished is then cancelled at the Router. A
        consumer that hangs in a write past the bound of unread tokens, or past the deadline, is cancelled there; the
        error comes out of the closing.
        """
        request.request_id = request.request_id or new_request_id()
        timer = RequestTimer(self._metrics)
        try:
            with self._stream_slot(), caller.allowance.streams(max(1, request.n)):
                prepared = caller.apply(await self._prepare(request), self.model)
                caller.allowance.charge_prompt(len(prepared.prompt_ids))
                async with Interruption(prepared.timeout_s) as interruption:
                    with self._submitted(prepared, interruption, timer) as choices:
                        while choices:
                            await wait_for_news([choice.mailbox for choice in choices])
                            events = [
                                event for choice in choices if choice.mailbox.has_news for event in _accept(choice)
                            ]
                            caller.allowance.charge_output(sum(map(_num_tokens, events)))
                            yield events
                            choices = [choice for choice in choices if choice.generation.finished is None]
        except (asyncio.CancelledError, GeneratorExit):
            timer.on_failed("CANCELLED")
            raise
        except Exception as error:
            timer.on_failed(status_code(error).name)
            raise

    async def tokenize(self, request: pb.TokenizeRequest, caller: Caller) -> pb.TokenizeResponse:
        """Text or a conversation as token ids. Raises RequestError or LimitReached."""
        caller.allowance.count_request()
        if request.ByteSize() > LARGE_REQUEST_BYTES:
            return await asyncio.to_thread(_tokenize, request, self.model)
        return _tokenize(request, self.model)

    async def detokenize(self, request: pb.DetokenizeRequest, caller: Caller) -> pb.DetokenizeResponse:
        """The text of token ids, special tokens left out. Raises RequestError or LimitReached."""
        caller.allowance.count_request()
        model = self.model
        check_model(request.model, model)
        check_vocabulary(request.token_ids, model.vocab_size, "token_ids")
        return pb.DetokenizeResponse(text=model.tokenizer.decode(request.token_ids))

    def list_models(self) -> pb.ListModelsResponse:
        """The one model that this server has."""
        model = self.model
        listed = pb.Model(
            name=model.name,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            defaults=default_options(model.defaults),
        )
        return pb.ListModelsResponse(models=[listed])

    async def server_info(self) -> pb.GetServerInfoResponse:
        """How this server and its Router are now."""
        state = await self._link.describe()
        return pb.GetServerInfoResponse(
            version=version("mull"),
            ready=state.ready and not self.is_draining,
            reason=DRAINING if self.is_draining else state.reason,
            uptime_seconds=time.monotonic() - self._start_s,
            num_streams=self.num_streams,
            http_port=self.http_port,
            routers=[state.description] if state.description is not None else [],
        )

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
        if request.ByteSize() > LARGE_REQUEST_BYTES:
            prepared = await asyncio.to_thread(prepare, request, self.model)
        else:
            prepared = prepare(request, self.model)
        if prepared.grammar is not None:
            await self._check_grammar(prepared.grammar, self._model.path, prepared.grammar_field)
        return prepared

    @contextmanager
    def _submitted(
        self, request: PreparedRequest, interruption: Interruption, timer: RequestTimer
    ) -> Iterator[list[_Choice]]:
        """Inside, the request's generations run; what has not finished at the end is cancelled."""
        choices: list[_Choice] = []
        try:
            for number in range(request.n):
                mailbox = self._link.submit(request, number)
                mailbox.on_overflow = interruption.interrupt
                own_timer = timer if number == 0 else timer.sibling()
                choices.append(_Choice(Generation(request, self._model, number), mailbox, own_timer))
            with self.budgets.running(request, [choice.mailbox for choice in choices]):
                yield choices
        finally:
            for choice in choices:
                choice.mailbox.on_overflow = None
                self._link.release(choice.mailbox)


def _accept(choice: _Choice) -> list[pb.GenerateEvent]:
    generation, timer = choice.generation, choice.timer
    delivery = choice.mailbox.take()
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


def _num_tokens(event: pb.GenerateEvent) -> int:
    body = event.WhichOneof("event")
    return 0 if body in (None, "started") else len(getattr(event, body).token_ids)


def _label(enum_name: str) -> str:
    """REASON_STOP → stop."""
    return enum_name.removeprefix("REASON_").lower()


def _tokenize(request: pb.TokenizeRequest, model: ServedModel) -> pb.TokenizeResponse:
    check_model(request.model, model)
    check_conversation_bounds(request.conversation)
    tokenizer = model.tokenizer
    text = request.text
    if request.WhichOneof("input") == "conversation":
        text = render_conversation(request.conversation.messages, request.conversation.tools, tokenizer)
    token_ids = tokenizer.encode(text)
    texts = [tokenizer.token_text(token_id) for token_id in token_ids]
    return pb.TokenizeResponse(token_ids=token_ids, max_model_len=model.max_model_len, texts=texts)
