"""The gateway's end of a Session with one Router: submits, cancels, and hands updates to mailboxes.

Hop 4. One stream is kept open, and opened again with a growing pause when it breaks; the address is asked for each
time, because a Router that was restarted listens elsewhere. Beside it the Router is asked how it is, so that the
gateway knows when it can serve. Per engine step one message is read and its updates are appended: no task per token.
Knows nothing of text, phases or clients.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc.aio

from cluster.config import TlsFiles
from cluster.errors import NotReady, Overloaded
from cluster.gateway.mailbox import Mailbox
from cluster.gateway.requests import PreparedRequest
from cluster.tls import LINK_NAME, link_channel_credentials
from mull.v1 import router_pb2 as pb
from mull.v1.router_pb2_grpc import RouterServiceStub

if TYPE_CHECKING:
    # Exists for type checkers only.
    from mull.v1.router_pb2_grpc import RouterServiceAsyncStub

logger = logging.getLogger(__name__)

RouterAddress = Callable[[], Awaitable[str]]
"""Says where the Router listens now, as host:port."""

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
MAX_UNSENT_MESSAGES = 8192


def static_address(address: str) -> RouterAddress:
    """A Router that never moves."""

    async def same() -> str:
        return address

    return same


@dataclass(frozen=True, kw_only=True)
class LinkTimes:
    """Waits of a link, in seconds."""

    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    describe_timeout_s: float = 5.0
    poll_starting_s: float = 0.25
    poll_ready_s: float = 2.0


@dataclass(frozen=True)
class RouterState:
    """What is known of the Router."""

    ready: bool
    reason: str
    """Why it is not ready; empty when it is."""
    description: pb.DescribeResponse | None


class RouterLink:
    """One Router, as the gateway sees it."""

    def __init__(
        self,
        address: RouterAddress,
        *,
        max_unread_tokens: int,
        times: LinkTimes | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        """`tls` makes the links TLS, with a certificate at both ends; the files are read again for each connection."""
        self.state = RouterState(False, "not connected to the Router yet", None)
        self.context_limit: int | None = None
        """Longest prompt plus output, in tokens, as the Router said last; kept while it is away."""
        self._address = address
        self._max_unread_tokens = max_unread_tokens
        self._times = times or LinkTimes()
        self._tls = tls
        self._keys = itertools.count(1)
        self._mailboxes: dict[int, Mailbox] = {}
        self._session: _Session | None = None
        self._updated = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Connect in the background."""
        self.task = asyncio.create_task(self._keep_connected(), name="router link")

    async def close(self) -> None:
        """Leave the Router, which then cancels what is left. Requests still open fail with NotReady."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self._forget_session("this server is shutting down")

    def submit(self, request: PreparedRequest, choice: int = 0) -> Mailbox:
        """Send one of a request's generations to the Router. Raises NotReady or Overloaded. Pair with `release`."""
        if self._session is None:
            raise NotReady(f"{self.state.reason}; try again soon")
        mailbox = Mailbox(next(self._keys), self._max_unread_tokens)
        self._session.send(_submit_message(mailbox.key, request, choice))
        self._mailboxes[mailbox.key] = mailbox
        return mailbox

    def release(self, mailbox: Mailbox) -> None:
        """The stream has ended; a request that has not is cancelled at once."""
        if self._mailboxes.pop(mailbox.key, None) is not None and self._session is not None:
            self._session.cancel(mailbox.key)

    def set_budget(self, mailbox: Mailbox, thinking_budget: int) -> None:
        """Let a request that is under way think no longer than that, in tokens. Raises Overloaded."""
        if mailbox.key in self._mailboxes and self._session is not None:
            budget = pb.SetBudget(key=mailbox.key, thinking_budget=thinking_budget)
            self._session.send(pb.GatewayMessage(set_budget=budget))

    @property
    def is_connected(self) -> bool:
        """Whether a session is open."""
        return self._session is not None

    def mailbox(self, key: int) -> Mailbox | None:
        """The mailbox of a request that is under way."""
        return self._mailboxes.get(key)

    async def updated(self) -> None:
        """Wait until the Router was asked, found or lost again. For one waiter."""
        await self._updated.wait()
        self._updated.clear()

    async def describe(self) -> RouterState:
        """Ask the Router now; the last known state where there is no link."""
        if self._session is not None:
            await self._ask(self._session.stub)
        return self.state

    async def _keep_connected(self) -> None:
        pause_s = self._times.first_pause_s
        while True:
            try:
                await self._hold_session()
            except (
                Exception
            ) as error:  # whatever broke it, the remedy is to connect again; the reason is logged and shown
                if self._session is not None:
                    pause_s = self._times.first_pause_s
                self._on_lost(f"the Router is out of reach ({_reason(error)})")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._times.longest_pause_s)

    async def _hold_session(self) -> None:
        """Open a session and read it until it breaks; always raises."""
        address = await self._address()
        async with _channel(address, self._tls) as channel:
            stub = RouterServiceStub(channel)
            description = await stub.Describe(pb.DescribeRequest(), timeout=self._times.describe_timeout_s)
            session = _Session(stub)
            self._session = session
            self._set_state(RouterState(description.ready, description.reason, description))
            logger.info("connected to the Router at %s", address)
            watcher = asyncio.create_task(self._watch(stub), name="router watcher")
            try:
                async for message in session.call:
                    self._dispatch(message)
            finally:
                watcher.cancel()
                await asyncio.gather(watcher, return_exceptions=True)
        raise NotReady("it closed the session")

    def _dispatch(self, message: pb.RouterMessage) -> None:
        """Append each update to its mailbox. What a cancelled request still had on the way is dropped."""
        for update in message.updates:
            mailbox = self._mailboxes.get(update.key)
            if mailbox is None:
                continue
            mailbox.put(update)
            if mailbox.is_ended:
                del self._mailboxes[update.key]
                if not update.HasField("end") and self._session is not None:
                    self._session.cancel(update.key)

    async def _watch(self, stub: RouterServiceAsyncStub) -> None:
        while True:
            times = self._times
            await asyncio.sleep(times.poll_ready_s if self.state.ready else times.poll_starting_s)
            await self._ask(stub)

    async def _ask(self, stub: RouterServiceAsyncStub) -> None:
        try:
            description = await stub.Describe(pb.DescribeRequest(), timeout=self._times.describe_timeout_s)
        except Exception as error:  # whatever it was, the Router must be asked again
            if not isinstance(error, grpc.aio.AioRpcError):
                logger.exception("asking the Router failed")
            # The session itself may live on; it is what tells whether the Router is lost.
            self._set_state(RouterState(False, f"the Router does not answer ({_reason(error)})", None))
        else:
            self._set_state(RouterState(description.ready, description.reason, description))

    def _on_lost(self, reason: str) -> None:
        if self._session is not None or self.state.reason != reason:
            logger.warning("%s", reason)
        self._forget_session(reason)

    def _forget_session(self, reason: str) -> None:
        self._session = None
        self._set_state(RouterState(False, reason, None))
        mailboxes, self._mailboxes = self._mailboxes, {}
        for mailbox in mailboxes.values():
            mailbox.fail(NotReady(f"{reason}; send the request again"))

    def _set_state(self, state: RouterState) -> None:
        self.state = state
        if state.description is not None:
            self.context_limit = state.description.max_model_len
        self._updated.set()


class _Session:
    """An open Session call and the messages that still have to be sent over it."""

    def __init__(self, stub: RouterServiceAsyncStub) -> None:
        self.stub = stub
        self._outbox: asyncio.Queue[pb.GatewayMessage] = asyncio.Queue(MAX_UNSENT_MESSAGES)
        self.call = stub.Session(self._outgoing())

    def send(self, message: pb.GatewayMessage) -> None:
        """Raises Overloaded when the Router has stopped reading."""
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull as error:
            raise Overloaded(f"{MAX_UNSENT_MESSAGES} messages wait for the Router; try again later") from error

    def cancel(self, key: int) -> None:
        """Cancel one request. A Router that reads no more is told by ending the session, which cancels all."""
        try:
            self.send(pb.GatewayMessage(cancel=pb.Cancel(key=key)))
        except Overloaded:
            logger.exception("ending the session: a cancel could not be sent")
            self.call.cancel()

    async def _outgoing(self) -> AsyncIterator[pb.GatewayMessage]:
        while True:
            yield await self._outbox.get()


def _channel(address: str, tls: TlsFiles | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", LINK_NAME))
    return grpc.aio.secure_channel(address, link_channel_credentials(tls), options)


def _submit_message(key: int, request: PreparedRequest, choice: int) -> pb.GatewayMessage:
    submit = pb.Submit(
        key=key,
        request_id=request.request_id,
        prompt_ids=request.prompt_ids,
        sampling=_sampling_message(request, choice),
        max_tokens=request.max_tokens,
        stop_token_ids=sorted(request.stop_token_ids),
        starts_thinking=request.starts_thinking,
        thinking_budget=request.thinking_budget,
        close_thinking_ids=request.close_thinking_ids,
        min_tokens=request.min_tokens,
        priority=request.priority,
        cache_salt=request.cache_salt,
        grammar=request.grammar,
        bad_words=[pb.TokenSequence(ids=ids) for ids in request.bad_words],
        num_prompt_logprobs=request.num_prompt_logprobs,
    )
    return pb.GatewayMessage(submit=submit)


def _sampling_message(request: PreparedRequest, choice: int) -> pb.RouterSampling:
    params = request.sampling
    return pb.RouterSampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=request.seed_of(choice),
        num_logprobs=params.num_logprobs,
        logit_bias=request.logit_bias,
    )


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}".replace("\n", " ")
