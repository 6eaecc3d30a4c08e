"""GenerationCore: what the gateway does with a request, whatever protocol it came by.

Between hops 1 and 11: checks the request, submits its generations, gives out their events as they come, and cancels
what is left when the consumer stops or the deadline passes. Knows neither gRPC calls nor HTTP; both are thin over it.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from cluster.errors import NotReady, Overloaded
from cluster.gateway.access import Caller
from cluster.gateway.budgets import RunningBudgets
from cluster.gateway.conversations import read_template_variables, render_conversation, variables_without_template
from cluster.gateway.copies import Copies
from cluster.gateway.generation import Generation
from cluster.gateway.grammar_check import GrammarCheck, compiled
from cluster.gateway.interruption import Interruption
from cluster.gateway.mailbox import Mailbox, wait_for_news
from cluster.gateway.request_bounds import check_conversation_bounds
from cluster.gateway.request_log import RequestRecord
from cluster.gateway.request_trace import RequestTrace
from cluster.gateway.requests import PreparedRequest, check_model, new_request_id, prepare
from cluster.gateway.resumption import MissingEvents, check_repeatable, rebuild
from cluster.gateway.running import RunningChoice, RunningRequest
from cluster.gateway.sampling_options import default_options
from cluster.gateway.served_model import ServedModel
from cluster.gateway.status import status_code
from cluster.gateway.stopping import check_vocabulary
from cluster.gateway.submission import submit_message
from cluster.metrics.gateway import GatewayMetrics
from cluster.metrics.request_timer import RequestTimer
from cluster.tracing import TraceParent
from mull.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from cluster.spans import Tracing

logger = logging.getLogger(__name__)

# Template and encoding of a larger request take over a millisecond or so: they run in a thread, the streams go on.
LARGE_REQUEST_BYTES = 16 * 1024
LARGE_OUTPUT_TOKENS = 4096
"""So is output that a client holds."""
DRAINING = "this server is shutting down"
LAST_WORD_S = 1.0
"""For clients to read why their streams were cut."""


class HeldEvents(enum.Enum):
    """What a resumed request gets of the events that its client has."""

    LEFT_OUT = enum.auto()
    REPEATED = enum.auto()


class GenerationCore:
    """The service behind every protocol."""

    def __init__(
        self,
        model: ServedModel,
        copies: Copies,
        metrics: GatewayMetrics,
        *,
        max_streams: int,
        check_grammar: GrammarCheck = compiled,
        tracing: Tracing | None = None,
    ) -> None:
        """`tracing`: where requests are traced."""
        self.num_streams = 0
        self.is_draining = False
        self.http_port = 0
        """Where this server answers HTTP, for those who ask by gRPC; 0: it does not."""
        self.budgets = RunningBudgets(copies)
        self._model = model
        self._copies = copies
        self._metrics = metrics
        self._max_streams = max_streams
        self._check_grammar = check_grammar
        self._tracing = tracing
        self._start_s = time.monotonic()
        self._interruptions: set[Interruption] = set()
        """Of the streams that are open."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def model(self) -> ServedModel:
        """The model within the context that every Router has room for."""
        limit = self._copies.context_limit
        return self._model if limit is None else self._model.limited_to(limit)

    async def stream(
        self,
        request: pb.GenerateRequest,
        caller: Caller,
        held: HeldEvents = HeldEvents.LEFT_OUT,
        *,
        trace_parent: str | None = None,
    ) -> AsyncGenerator[list[pb.GenerateEvent]]:
        """The events of all generations of a request, in batches as they come; gives it a request id where it has none.

        Raises RequestError, Overloaded, NotReady, SlowReader, DeadlinePassed or EngineError. Close it
        (`contextlib.aclosing`) in the task that iterates: what has not finished is then cancelled at the Router. A
        consumer that hangs in a write past the bound of unread tokens, or past the deadline, is cancelled there; the
        error comes out of the closing. `trace_parent`: the header of that name, as it came.
        """
        request.request_id = request.request_id or new_request_id()
        timer = RequestTimer(self._metrics, caller.tenant)
        record = self._record(request, caller, TraceParent.parse(trace_parent))
        try:
            with self._stream_slot(), caller.allowance.streams(max(1, request.n)):
                prepared = caller.apply(await self._prepare(request), self.model)
                prepared = replace(prepared, trace_parent=record.trace_parent)
                caller.allowance.charge_prompt(len(prepared.prompt_ids))
                if held is HeldEvents.REPEATED:
                    check_repeatable(prepared)
                async with (
                    Interruption(prepared.timeout_s) as interruption,
                    self._submitted(prepared, interruption, timer, held) as running,
                ):
                    record.on_submitted(running.generations)
                    if running.events:
                        yield running.events
                    choices = running.choices
                    mailboxes = [choice.mailbox for choice in choices]
                    while choices:
                        await wait_for_news(mailboxes)
                        events: list[pb.GenerateEvent] = []
                        for choice in choices:
                            if choice.mailbox.has_news:
                                events += choice.take()
                                caller.allowance.charge_output(choice.num_taken)
                        if record.awaits_first:
                            record.on_tokens()
                        yield events
                        if any(choice.has_finished for choice in choices):
                            choices = [choice for choice in choices if not choice.has_finished]
                            mailboxes = [choice.mailbox for choice in choices]
        except (asyncio.CancelledError, GeneratorExit):
            timer.on_failed("CANCELLED")
            record.on_ended("CANCELLED")
            raise
        except Exception as error:
            code = status_code(error).name
            timer.on_failed(code)
            record.on_ended(code)
            raise
        record.on_ended("OK")

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
        """How this server and its Routers are now."""
        state = await self._copies.describe()
        return pb.GetServerInfoResponse(
            version=version("mull"),
            ready=state.ready and not self.is_draining,
            reason=DRAINING if self.is_draining else state.whole_reason,
            uptime_seconds=time.monotonic() - self._start_s,
            num_streams=self.num_streams,
            http_port=self.http_port,
            routers=state.descriptions.values(),
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

    async def cut_streams(self) -> None:
        """End those that are still open; their clients are told why."""
        for interruption in tuple(self._interruptions):
            interruption.interrupt(NotReady(f"{DRAINING}; send the request to another server"))
        await self.wait_until_idle(LAST_WORD_S)

    @contextmanager
    def _stream_slot(self) -> Iterator[None]:
        if self.is_draining:
            raise NotReady(f"{DRAINING}; send the request to another server")
        if self.num_streams >= self._max_streams:
            raise Overloaded(f"{self.num_streams} streams are open, the limit is {self._max_streams}; try again later")
        self.num_streams += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_streams -= 1
            if self.num_streams == 0:
                self._idle.set()

    def _record(self, request: pb.GenerateRequest, caller: Caller, parent: TraceParent | None) -> RequestRecord:
        trace = None if self._tracing is None else RequestTrace(self._tracing, parent, self._model.name)
        return RequestRecord(request, caller.tenant, parent=parent, trace=trace)

    async def _prepare(self, request: pb.GenerateRequest) -> PreparedRequest:
        if request.ByteSize() > LARGE_REQUEST_BYTES:
            prepared = await asyncio.to_thread(prepare, request, self.model)
        else:
            prepared = prepare(request, self.model)
        if prepared.grammar is not None:
            await self._check_grammar(prepared.grammar, self._model.path, prepared.grammar_field)
        return prepared

    @asynccontextmanager
    async def _submitted(
        self, request: PreparedRequest, interruption: Interruption, timer: RequestTimer, held: HeldEvents
    ) -> AsyncIterator[RunningRequest]:
        """Inside, the request's generations run; what has not finished at the end is cancelled."""
        running = RunningRequest()
        self._interruptions.add(interruption)
        try:
            for number in range(request.n):
                own_timer = timer if number == 0 else timer.sibling()
                await self._open(running, request, number, own_timer, held)
            for choice in running.choices:
                choice.mailbox.on_overflow = interruption.interrupt
            with self.budgets.running(request, [choice.mailbox for choice in running.choices]):
                yield running
        finally:
            self._interruptions.discard(interruption)
            for choice in running.choices:
                choice.mailbox.on_overflow = None
                self._copies.release(choice.mailbox)

    async def _open(
        self, running: RunningRequest, request: PreparedRequest, number: int, timer: RequestTimer, held: HeldEvents
    ) -> None:
        """Begin one of the generations, or go on with it, as far as the client does not have all of it."""
        generation, missing = Generation(request, self._model, number), None
        has = request.held.get(number)
        if has is not None:
            if has.finished and held is HeldEvents.LEFT_OUT:
                return
            missing = MissingEvents(has) if held is HeldEvents.LEFT_OUT else None
            if len(has.token_ids) > LARGE_OUTPUT_TOKENS:
                rebuilt = await asyncio.to_thread(rebuild, generation, has, request, number)
            else:
                rebuilt = rebuild(generation, has, request, number)
            running.events += rebuilt if missing is None else missing.of(rebuilt)
            timer.on_resumed(generation.num_thinking_tokens, generation.num_answer_tokens)
        running.generations.append(generation)
        if generation.finished is None:
            mailbox = self._submit(request, number)
            running.choices.append(RunningChoice(generation, mailbox, timer, missing))

    def _submit(self, request: PreparedRequest, number: int) -> Mailbox:
        submit = submit_message(request, number)
        if not request.is_resumed:
            return self._copies.submit(submit)
        has = request.held.get(number)
        if has is not None:
            # Its Started has come, and with it those logprobs.
            submit.ClearField("num_prompt_logprobs")
        return self._copies.resume(submit, has.token_ids if has is not None else ())


def _tokenize(request: pb.TokenizeRequest, model: ServedModel) -> pb.TokenizeResponse:
    check_model(request.model, model)
    check_conversation_bounds(request.conversation)
    tokenizer = model.tokenizer
    text = request.text
    if request.WhichOneof("input") == "conversation":
        variables = read_template_variables(request.chat_template_variables_json)
        text = render_conversation(request.conversation.messages, request.conversation.tools, tokenizer, variables)
    elif request.chat_template_variables_json:
        raise variables_without_template()
    token_ids = tokenizer.encode(text)
    texts = [tokenizer.token_text(token_id) for token_id in token_ids]
    return pb.TokenizeResponse(token_ids=token_ids, max_model_len=model.max_model_len, texts=texts)
