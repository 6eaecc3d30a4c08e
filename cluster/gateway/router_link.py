"""The gateway's end of a Session with one Router: messages out, messages in, and whether it is there at all.

Hop 4. One stream is kept open, and opened again with a growing pause when it breaks. Beside it the Router is asked how
it is, so that the gateway knows when it can serve. Knows nothing of requests: what a message means, and what to do
about a loss, is its owner's business.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import grpc.aio

from cluster.config import TlsFiles
from cluster.errors import NotReady, Overloaded
from cluster.tls import LINK_NAME, link_channel_credentials
from mull.v1 import router_pb2 as pb
from mull.v1.router_pb2_grpc import RouterServiceStub

if TYPE_CHECKING:
    # Exists for type checkers only.
    from mull.v1.router_pb2_grpc import RouterServiceAsyncStub

logger = logging.getLogger(__name__)

CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
MAX_UNSENT_MESSAGES = 8192


@dataclass(frozen=True, kw_only=True)
class LinkTimes:
    """Waits of a link, in seconds."""

    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    describe_timeout_s: float = 5.0
    poll_starting_s: float = 0.25
    poll_ready_s: float = 2.0
    longest_silence_s: float = 30.0
    """Of a Router that is asked how it is: past it the session is given up, though its connection stands."""


@dataclass(frozen=True)
class RouterState:
    """What is known of the Router."""

    ready: bool
    reason: str
    """Why it is not ready; empty when it is."""
    description: pb.DescribeResponse | None
    detail: str = ""
    """What the connection said of that, addresses too: for who runs the server, not for its clients."""

    @property
    def whole_reason(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


class LinkOwner(Protocol):
    """Who is told what comes over a link. Nothing here may wait."""

    def on_connected(self, link: RouterLink) -> None:
        """A session is open, and `link.state` is new."""
        ...

    def on_described(self, link: RouterLink) -> None:
        """`link.state` is new; the link may be connected or not."""
        ...

    def on_lost(self, link: RouterLink) -> None:
        """The session is gone, and with it all that was sent over it."""
        ...

    def on_message(self, link: RouterLink, message: pb.RouterMessage) -> None:
        """What a step of the Router has."""
        ...


class RouterLink:
    """One Router, as the gateway sees it."""

    def __init__(self, address: str, owner: LinkOwner, times: LinkTimes, tls: TlsFiles | None = None) -> None:
        """`tls` makes it TLS, with a certificate at both ends; the files are read again for each connection."""
        self.address = address
        self.state = RouterState(False, "not connected to the Router yet", None)
        self.task: asyncio.Task[None] | None = None
        self._owner = owner
        self._times = times
        self._tls = tls
        self._session: _Session | None = None
        self._last_answer_s = 0.0

    @property
    def is_connected(self) -> bool:
        """Whether a session is open."""
        return self._session is not None

    def start(self) -> None:
        """Connect in the background."""
        self.task = asyncio.create_task(self._keep_connected(), name=f"router link {self.address}")

    async def close(self) -> None:
        """Leave the Router, which then cancels what is left."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self._on_lost(RouterState(False, "this server is shutting down", None))

    def send(self, message: pb.GatewayMessage) -> None:
        """Raises Overloaded when the Router has stopped reading, NotReady when there is no session."""
        if self._session is None:
            raise NotReady(self.state.reason)
        self._session.send(message)

    def cut(self) -> None:
        """End the session, which cancels all that was sent over it; another one follows."""
        if self._session is not None:
            self._session.call.cancel()

    async def describe(self) -> RouterState:
        """Ask the Router now; the last known state where there is no session."""
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
                self._on_lost(RouterState(False, "the Router is out of reach", None, _reason(error)))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._times.longest_pause_s)

    async def _hold_session(self) -> None:
        """Open a session and read it until it breaks; always raises."""
        async with _channel(self.address, self._tls) as channel:
            stub = RouterServiceStub(channel)
            description = await stub.Describe(pb.DescribeRequest(), timeout=self._times.describe_timeout_s)
            session = _Session(stub)
            self._session = session
            self._last_answer_s = time.monotonic()
            self.state = _state_of(description)
            logger.info("connected to the Router at %s", self.address)
            self._owner.on_connected(self)
            tasks = [
                asyncio.create_task(session.write_forever(), name="router writer"),
                asyncio.create_task(self._watch(stub), name="router watcher"),
            ]
            try:
                async for message in session.call:
                    self._owner.on_message(self, message)
            except asyncio.CancelledError:
                # `cut` ends the call, not this task.
                if not session.call.cancelled() or _is_being_cancelled():
                    raise
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        raise NotReady("the session was closed")

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
            self.state = RouterState(False, "the Router does not answer", None, _reason(error))
            if time.monotonic() - self._last_answer_s > self._times.longest_silence_s:
                self.cut()
        else:
            self._last_answer_s = time.monotonic()
            self.state = _state_of(description)
        self._owner.on_described(self)

    def _on_lost(self, state: RouterState) -> None:
        if self._session is not None or self.state != state:
            logger.warning("%s: %s", self.address, state.whole_reason)
        self.state = state
        session, self._session = self._session, None
        if session is not None:
            self._owner.on_lost(self)
        else:
            self._owner.on_described(self)


class _Session:
    """An open Session call and the messages that still have to be sent over it."""

    def __init__(self, stub: RouterServiceAsyncStub) -> None:
        self.stub = stub
        self._outbox: asyncio.Queue[pb.GatewayMessage] = asyncio.Queue(MAX_UNSENT_MESSAGES)
        # The stubs know only calls that are given an iterator.
        self.call: Any = stub.Session()  # type: ignore[call-arg]

    def send(self, message: pb.GatewayMessage) -> None:
        """Raises Overloaded when the Router has stopped reading."""
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull as error:
            raise Overloaded(f"{MAX_UNSENT_MESSAGES} messages wait for the Router; try again later") from error

    async def write_forever(self) -> None:
        """Until the call breaks, which its reader learns as well."""
        while True:
            await self.call.write(await self._outbox.get())


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _channel(address: str, tls: TlsFiles | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", LINK_NAME))
    return grpc.aio.secure_channel(address, link_channel_credentials(tls), options)


def _state_of(description: pb.DescribeResponse) -> RouterState:
    return RouterState(description.ready, description.reason, description)


def _reason(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}".replace("\n", " ")
