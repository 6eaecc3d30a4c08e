"""The gateway's end of a Session with one Router: submits, cancels, and hands updates to mailboxes.

Hop 4. One stream is kept open and opened again, with a growing pause, when it breaks; the address is asked for each time,
because a Router that was restarted listens elsewhere. Beside it the Router is asked how it is, so that the gateway knows
when it can serve. Per engine step one message is read and its updates are appended: no task or await per token.
Knows nothing of text, phases or clients.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import grpc.aio

from cluster.errors import NotReady, Overloaded
from cluster.gateway.mailbox import Mailbox
from cluster.gateway.requests import PreparedRequest
from mull.v1 import router_pb2 as pb
from mull.v1.router_pb2_grpc import RouterServiceAsyncStub, RouterServiceStub
from workers.step import SamplingParams

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

    def __init__(self, address: RouterAddress, *, max_unread_tokens: int, times: LinkTimes | None = None) -> None:
        self.state = RouterState(False, "not connected to the Router yet", None)
        self._address = address
        self._max_unread_tokens = max_unread_tokens
        self._times = times or LinkTimes()
        self._keys = itertools.count(1)
        self._mailboxes: dict[int, Mailbox] = {}
        self._session: _Session | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Connect in the background."""
        self._task = asyncio.create_task(self._keep_connected(), name="router link")

    async def close(self) -> None:
        """Leave the Router, which then cancels what is left. Requests still open fail with NotReady."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._on_lost("this server is shutting down")

    def submit(self, request: PreparedRequest) -> Mailbox:
        """Send a request to the Router. Raises NotReady or Overloaded. Pair with `release`."""
        if self._session is None:
            raise NotReady(f"{self.state.reason}; try again soon")
        mailbox = Mailbox(next(self._keys), self._max_unread_tokens)
        self._session.send(_submit_message(mailbox.key, request))
        self._mailboxes[mailbox.key] = mailbox
        return mailbox

    def release(self, mailbox: Mailbox) -> None:
        """The stream has ended; a request that has not is cancelled at once."""
        if self._mailboxes.pop(mailbox.key, None) is not None and self._session is not None:
            self._session.cancel(mailbox.key)

    async def changed(self) -> None:
        """Wait until `state` is another one. For one waiter."""
        await self._changed.wait()
        self._changed.clear()

    async def describe(self) -> RouterState:
        """Ask the Router now; the last known state where there is no link."""
        if self._session is not None:
            await self._ask(self._session.stub)
        return self.state

    async def _keep_connected(self) -> None:
        pause_s = self._times.first_pause_s
        while True:
            try:
                async for _ in self._sessions():
                    pause_s = self._times.first_pause_s
            except Exception as error:  # whatever broke it, the remedy is to connect again; the reason is kept and logged
                self._on_lost(_reason(error))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._times.longest_pause_s)
