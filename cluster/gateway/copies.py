"""The copies of the model, as the gateway sees them: a link to each, and the mailboxes of what runs there.

Hops 3 and 4. Drives `recovery.py` with sockets and a clock: what a link says goes in, what comes out is sent or put
into mailboxes. Which copies there are is asked for again and again, because a Router that was restarted listens
elsewhere, and copies come and go. Per engine step one message is read and its updates are appended: no task per token.
Knows nothing of text, phases or clients.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.config import TlsFiles
from cluster.errors import NotReady, Overloaded
from cluster.gateway.affinity import CopyLoad
from cluster.gateway.mailbox import Mailbox
from cluster.gateway.recovery import Action, CopyState, Deliver, Fail, Flight, Recovery, ReplayPolicy, Send
from cluster.gateway.router_link import LinkTimes, RouterLink, RouterState
from mull.v1 import router_pb2 as pb

logger = logging.getLogger(__name__)

CopyDirectory = Callable[[], Awaitable[Sequence[str]]]
"""Says where the Routers listen now, each as host:port."""


def static_addresses(*addresses: str) -> CopyDirectory:
    """Routers that never move."""

    async def same() -> Sequence[str]:
        return addresses

    return same


@dataclass(frozen=True)
class CopiesState:
    """What is known of all copies together."""

    ready: bool
    """At least one of them takes work."""
    reason: str
    """Why none does; empty when one does."""
    whole_reason: str
    """The same with what connections said, for who runs the server."""
    descriptions: Mapping[str, pb.DescribeResponse]
    """What each that is in reach said of itself, by its address."""
    num_ready: int = 0


class Copies:
    """All Routers of one gateway. `on_pause` gets why a request stood still, and how many seconds, once it goes on."""

    def __init__(
        self,
        directory: CopyDirectory,
        *,
        max_unread_tokens: int,
        policy: ReplayPolicy | None = None,
        times: LinkTimes | None = None,
        tls: TlsFiles | None = None,
        on_pause: Callable[[str, float], object] = lambda _cause, _pause_s: None,
    ) -> None:
        """`tls` makes the links TLS."""
        self.context_limit: int | None = None
        """Longest prompt plus output that fits every copy, in tokens, as they said last; kept while they are away."""
        self.task: asyncio.Task[None] | None = None
        self._recovery = Recovery(policy or ReplayPolicy())
        self._directory = directory
        self._directory_error = "no Router is known yet"
        self._max_unread_tokens = max_unread_tokens
        self._times = times or LinkTimes()
        self._tls = tls
        self._on_pause = on_pause
        self._links: dict[str, RouterLink] = {}
        self._mailboxes: dict[int, tuple[Flight, Mailbox]] = {}
        self._updated = asyncio.Event()
        self._look_again = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def start(self) -> None:
        """Find the copies and connect to them in the background."""
        self.task = asyncio.create_task(self._follow_directory(), name="copies")

    async def close(self) -> None:
        """Leave all Routers, which then cancel what is left. Requests still open fail with NotReady."""
        self._is_closed = True
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        for flight, mailbox in list(self._mailboxes.values()):
            mailbox.fail(NotReady("this server is shutting down; send the request again"))
            self._do(self._recovery.release(flight))
        self._mailboxes.clear()
        await asyncio.gather(*(link.close() for link in self._links.values()))

    # Requests

    def submit(self, submit: pb.Submit) -> Mailbox:
        """Let a new sequence run. Raises NotReady, Overloaded. Pair with `release`."""
        if self._is_closed or not self._recovery.has_ready_copy:
            raise NotReady(f"{self.state.reason}; try again soon")
        return self._opened(*self._recovery.open(submit, self._now_s()))

    def resume(self, submit: pb.Submit, output_ids: Sequence[int]) -> Mailbox:
        """Let a sequence go on behind its output, at the first copy that is ready. Raises NotReady."""
        if self._is_closed:
            raise NotReady("this server is shutting down; try again elsewhere")
        return self._opened(*self._recovery.resume(submit, self._now_s(), output_ids))

    def _opened(self, flight: Flight, actions: list[Action]) -> Mailbox:
        mailbox = Mailbox(flight.number, self._max_unread_tokens, num_received=len(flight.output_ids))
        self._mailboxes[flight.number] = flight, mailbox
        self._do(actions)
        return mailbox

    def release(self, mailbox: Mailbox) -> None:
        """The stream has ended; a request that has not is cancelled at once."""
        flight, _ = self._mailboxes.pop(mailbox.key, (None, None))
        if flight is not None:
            self._do(self._recovery.release(flight))

    def set_budget(self, mailbox: Mailbox, thinking_budget: int) -> None:
        """Let a request that is under way think no longer than that, in tokens. Raises Overloaded."""
        flight, _ = self._mailboxes.get(mailbox.key, (None, None))
        if flight is not None:
            self._do(self._recovery.set_budget(flight, thinking_budget))

    def mailbox(self, key: int) -> Mailbox | None:
        """The mailbox of what has this key at a copy."""
        flight = self._recovery.flight_of(key)
        return None if flight is None else self._mailboxes[flight.number][1]

    # Copies

    @property
    def state(self) -> CopiesState:
        """How the copies are, as far as is known."""
        # A copy of the links: other threads ask, too.
        states = {address: link.state for address, link in list(self._links.items())}
        descriptions = {name: state.description for name, state in states.items() if state.description is not None}
        num_ready = sum(state.ready for state in states.values())
        if num_ready:
            return CopiesState(True, "", "", descriptions, num_ready)
        away = [state for state in states.values() if state.reason]
        reason = "; ".join(dict.fromkeys(state.reason for state in away)) or self._directory_error
        whole = "; ".join(dict.fromkeys(state.whole_reason for state in away)) or self._directory_error
        return CopiesState(False, reason, whole, descriptions)

    @property
    def is_connected(self) -> bool:
        """Whether a session is open with any copy."""
        return any(link.is_connected for link in self._links.values())

    @property
    def num_replayed_tokens_total(self) -> Mapping[tuple[str, ...], float]:
        """Tokens behind which sequences went on at a copy, by what made it needed."""
        return {(loss.value,): num_tokens for loss, num_tokens in self._recovery.num_replayed_tokens_total.items()}

    @property
    def num_by_state(self) -> Mapping[tuple[str, ...], float]:
        """Copies that take work, and those that do not."""
        num_ready = self.state.num_ready
        return {("ready",): num_ready, ("not_ready",): len(self._links) - num_ready}

    @property
    def is_working(self) -> bool:
        """Whether its tasks run as they should; a Router that is away does not count."""
        tasks = [self.task, *(link.task for link in self._links.values())]
        return all(task is not None and not task.done() for task in tasks)

    async def updated(self) -> None:
        """Wait until a copy was asked, found or lost again. For one waiter."""
        await self._updated.wait()
        self._updated.clear()

    async def describe(self) -> CopiesState:
        """Ask all copies now."""
        await asyncio.gather(*(link.describe() for link in list(self._links.values())))
        return self.state

    # What the links say

    def on_connected(self, link: RouterLink) -> None:
        self._note()
        self._do(self._recovery.connected(link.address, _copy_state(link.state), self._now_s()))

    def on_described(self, link: RouterLink) -> None:
        self._note()
        if link.is_connected:
            self._do(self._recovery.described(link.address, _copy_state(link.state), self._now_s()))

    def on_lost(self, link: RouterLink) -> None:
        self._note()
        self._look_again.set()
        self._do(self._recovery.lost(link.address, link.state.reason, self._now_s()))

    def on_message(self, link: RouterLink, message: pb.RouterMessage) -> None:
        now_s, recovery, name = self._now_s(), self._recovery, link.address
        for update in message.updates:
            self._do(recovery.updated(name, update, now_s))

    # Inside

    async def _follow_directory(self) -> None:
        """Ask which copies there are, soon where none is ready, at once where one was lost."""
        while True:
            try:
                await self._relink(await self._directory())
            except Exception as error:  # it must be asked again; the links that there are go on
                reason = f"no Router is known ({type(error).__name__}: {error})".replace("\n", " ")
                if not self._links and reason != self._directory_error:
                    logger.warning("%s", reason)
                self._directory_error = reason
                self._updated.set()
            is_ready = self._recovery.has_ready_copy
            await self._sleep(self._times.poll_ready_s if is_ready else self._times.poll_starting_s)

    async def _sleep(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._look_again.wait()
        except TimeoutError:
            return
        # What was lost may still be listed for a moment.
        self._look_again.clear()
        await asyncio.sleep(self._times.first_pause_s)

    async def _relink(self, addresses: Iterable[str]) -> None:
        listed = set(addresses)
        for address in sorted(listed - self._links.keys()):
            link = self._links[address] = RouterLink(address, self, self._times, self._tls)
            link.start()
        for address in sorted(self._links.keys() - listed):
            # One that drains is listed no longer, and still has work of ours.
            if not self._links[address].is_connected:
                await self._links.pop(address).close()

    def _note(self) -> None:
        limits = [said.max_model_len for said in self.state.descriptions.values()]
        if limits:
            self.context_limit = min(limits)
        self._updated.set()

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Deliver(flight, update):
                    self._deliver(flight, update)
                case Send(name, message):
                    self._send(name, message)
                case Fail(flight, error):
                    self._mailboxes[flight.number][1].fail(error)
                case _:
                    self._on_pause(action.loss.value, action.pause_s)
        if self._recovery.num_waiting:
            self._set_timer()

    def _deliver(self, flight: Flight, update: pb.SequenceUpdate) -> None:
        _, mailbox = self._mailboxes[flight.number]
        mailbox.put(update)
        if mailbox.is_ended and not update.HasField("end"):
            # Nobody reads it.
            self._do(self._recovery.release(flight))

    def _send(self, name: str, message: pb.GatewayMessage) -> None:
        try:
            self._links[name].send(message)
        except Overloaded as error:
            self._on_unsent(name, message, error)

    def _on_unsent(self, name: str, message: pb.GatewayMessage, error: Overloaded) -> None:
        """A Router that reads no more: what would go there goes elsewhere; what must be told is told by the end."""
        match message.WhichOneof("message"):
            case "submit":
                end = pb.End(reason=pb.End.REASON_OVERLOADED, message=str(error))
                refused = pb.SequenceUpdate(key=message.submit.key, end=end)
                self._do(self._recovery.updated(name, refused, self._now_s()))
            case "cancel":
                logger.error("ending the session with %s: a cancel could not be sent (%s)", name, error)
                self._links[name].cut()
            case _:
                raise error

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due_s = self._recovery.next_s
        assert due_s is not None, "what waits has a time"
        self._timer = asyncio.get_running_loop().call_at(due_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._do(self._recovery.tick(self._now_s()))

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()


def _copy_state(state: RouterState) -> CopyState:
    said = state.description
    if said is None:
        return CopyState(ready=False)
    return CopyState(ready=state.ready, load=CopyLoad(num_running=said.num_running, num_waiting=said.num_waiting))
