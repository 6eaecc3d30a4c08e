"""A gateway's process in virtual time: the product's recovery and mailboxes between simulated clients and Routers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from cluster.errors import EngineError, MullError, NotReady
from cluster.gateway.mailbox import Delivery, Mailbox
from cluster.gateway.recovery import Action, CopyState, Deliver, Fail, Flight, Recovery, ReplayPolicy, Send
from mull.v1 import router_pb2 as pb
from tests.simulation.network import Connection, End
from tests.simulation.router import SimRouter
from tests.simulation.streams import STOP_TEXT, Ask, BrokenPromise, Ended, Failed, Tokens
from tests.simulation.world import Timer, World

POLICY = ReplayPolicy(timeout_s=3.0, first_pause_s=0.005, longest_pause_s=0.050)
POLL_S = 0.025
LONGEST_DESCRIBE_S = 0.010
LONGEST_READ_S = 0.003


@dataclass(eq=False)
class _Stream:
    """A client's stream, and how far it was told."""

    ask: Ask
    end: End
    flight: Flight
    mailbox: Mailbox
    position: int
    """Tokens of the output that its client has or is being sent."""
    output_ids: list[int] = field(default_factory=list)
    is_read_soon: bool = False
    is_over: bool = False
    num_admissions: int = 0


class SimGateway:
    """One process, until it is killed."""

    def __init__(
        self, world: World, name: str, routers: Mapping[int, SimRouter], on_end: Callable[[SimGateway], object]
    ) -> None:
        self.name = name
        self.is_alive = True
        self.is_draining = False
        self.links: dict[str, Connection] = {}
        self.clients: list[Connection] = []
        self._world, self._routers, self._on_end = world, routers, on_end
        self._recovery = Recovery(POLICY, seed=world.random.getrandbits(32))
        self._streams: dict[int, _Stream] = {}
        self._connected: set[str] = set()
        self._timer: Timer | None = None
        self._poll()

    @property
    def num_replays(self) -> int:
        return self._recovery.num_replays_total

    @property
    def is_idle(self) -> bool:
        return not self._streams and not self._recovery.num_waiting

    def kill(self) -> None:
        """SIGKILL."""
        if self.is_alive:
            self.is_alive = False
            self._world.tell("%s dies", self.name)
            for line in self.links.values():
                line.first.close()
            for line in self.clients:
                line.second.close()
            self._on_end(self)

    def drain(self, grace_s: float) -> None:
        """SIGTERM: nothing new, and after a time streams are ended and so is the process."""
        self._world.tell("%s drains", self.name)
        self.is_draining = True

        def cut() -> None:
            for stream in list(self._streams.values()):
                self._fail(stream, NotReady("shutting down"))
            self._world.after(0.010, self.kill)

        self._world.after(grace_s, cut)

    # Clients

    def accept(self, line: Connection) -> None:
        """A client connects."""
        self.clients.append(line)
        line.second.on_message = lambda ask: self._open(ask, line.second)

    def _open(self, ask: Ask, end: End) -> None:
        if not self.is_alive:
            return
        if self.is_draining:
            end.send(Failed(NotReady("shutting down")))
            return
        if (finish := ask.request.finish_of(ask.output_ids)) is not None:
            # It has all of it but the end.
            end.send(Ended(finish))
            return
        now_s, submit = self._world.now_s, ask.request.submit()
        try:
            if ask.output_ids:
                flight, actions = self._recovery.resume(submit, now_s, ask.output_ids)
            else:
                flight, actions = self._recovery.open(submit, now_s)
        except NotReady as error:
            end.send(Failed(error))
            return
        mailbox = Mailbox(flight.number, 1000, num_received=len(ask.output_ids))
        stream = _Stream(ask, end, flight, mailbox, len(ask.output_ids), list(ask.output_ids))
        self._streams[flight.number] = stream
        end.on_broken = lambda: self._close(stream)
        self._do(actions)

    def _close(self, stream: _Stream) -> None:
        """The client is gone, or has all."""
        if self.is_alive and not stream.is_over:
            stream.is_over = True
            del self._streams[stream.flight.number]
            self._do(self._recovery.release(stream.flight))

    def _fail(self, stream: _Stream, error: MullError) -> None:
        stream.end.send(Failed(error))
        self._close(stream)

    def _read_soon(self, stream: _Stream) -> None:
        if not stream.is_read_soon and not stream.is_over:
            stream.is_read_soon = True
            self._world.after(self._world.random.random() * LONGEST_READ_S, lambda: self._read(stream))

    def _read(self, stream: _Stream) -> None:
        stream.is_read_soon = False
        if not self.is_alive or stream.is_over or not stream.mailbox.has_news:
            return
        try:
            delivery = stream.mailbox.take()
        except MullError as error:
            self._fail(stream, error)
            return
        request, start = stream.ask.request, stream.position
        wanted = request.until_stop_text(stream.output_ids, delivery.token_ids)
        stream.output_ids += wanted
        stream.position += len(wanted)
        self._check_forced(stream, delivery, start)
        logprobs = [entry.logprob for entry in delivery.logprobs]
        while wanted:
            # Tokens of one delivery go out in several events: a client may have the first of them alone.
            cut = self._world.random.randint(1, len(wanted))
            stream.end.send(Tokens(start, wanted[:cut], logprobs[:cut]))
            wanted, logprobs, start = wanted[cut:], logprobs[cut:], start + cut
        if request.has_stop_text(stream.output_ids):
            stream.end.send(Ended(STOP_TEXT))
            self._close(stream)
        elif delivery.finish is not None:
            stream.end.send(Ended(delivery.finish))
            self._close(stream)
        elif stream.mailbox.has_news:
            self._read_soon(stream)

    def _check_forced(self, stream: _Stream, delivery: Delivery, start: int) -> None:
        """Which tokens were forced is told with them: it is how a client learns why the thoughts have ended."""
        forced = stream.ask.request.forced
        missing = range(max(forced.start, len(stream.ask.output_ids)), forced.stop)
        told_by_now = any(position in missing for position in range(start, start + len(delivery.token_ids)))
        if (told_by_now or delivery.forced) and delivery.forced != missing:
            raise BrokenPromise(f"{delivery.forced} are told to be forced, {missing} are")

    # Routers

    def _poll(self) -> None:
        """Look which Routers there are, connect to the new ones, ask the others how they are."""
        if not self.is_alive:
            return
        world = self._world
        for router in self._routers.values():
            if not router.is_alive:
                continue
            if router.name not in self.links:
                self._connect(router)
            elif router.name in self._connected:
                self._ask(router)
        world.after(POLL_S * world.between(0.5, 1.5), self._poll)

    def _connect(self, router: SimRouter) -> None:
        world, name = self._world, router.name
        line = self.links[name] = Connection(world, self.name, name)
        line.first.on_message = lambda message: self._on_message(name, message)
        state = router.describe()

        def opened() -> None:
            if not self.is_alive:
                return
            if line.is_broken or not router.is_alive:
                del self.links[name]
                return
            line.first.on_broken = lambda: self._on_lost(name)
            router.accept(line.second)
            self._connected.add(name)
            self._do(self._recovery.connected(name, state, world.now_s))

        world.after(world.random.random() * LONGEST_DESCRIBE_S, opened)

    def _ask(self, router: SimRouter) -> None:
        """An answer comes late, or twice, or is out of date by then."""
        state, world = router.describe(), self._world
        for _ in range(2 if world.chance(0.1) else 1):
            delay_s = world.random.random() * LONGEST_DESCRIBE_S
            world.after(delay_s, lambda: self._on_described(router.name, state))

    def _on_described(self, name: str, state: CopyState) -> None:
        if self.is_alive and name in self._connected:
            self._do(self._recovery.described(name, state, self._world.now_s))

    def _on_lost(self, name: str) -> None:
        if self.is_alive:
            self._world.tell("%s has lost %s", self.name, name)
            del self.links[name]
            self._connected.discard(name)
            self._do(self._recovery.lost(name, "out of reach", self._world.now_s))

    def _on_message(self, name: str, message: pb.RouterMessage) -> None:
        if self.is_alive:
            for update in message.updates:
                self._do(self._recovery.updated(name, update, self._world.now_s))

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Deliver(flight, update):
                    self._deliver(flight, update)
                case Send(name, message):
                    self._send(name, message)
                case Fail(flight, error):
                    stream = self._streams.get(flight.number)
                    assert stream is not None, "a flight failed that nobody reads"
                    self._fail_soon(stream, error)
        self._set_timer()

    def _fail_soon(self, stream: _Stream, error: MullError) -> None:
        stream.mailbox.fail(error)
        self._read_soon(stream)

    def _deliver(self, flight: Flight, update: pb.SequenceUpdate) -> None:
        stream = self._streams.get(flight.number)
        assert stream is not None, "an update came for a flight that nobody reads"
        if update.token_ids and not flight.was_admitted:
            raise BrokenPromise("tokens come before a slot is told")
        if update.HasField("admitted"):
            stream.num_admissions += 1
        if stream.num_admissions > 1:
            raise BrokenPromise("a slot is told twice")
        stream.mailbox.put(update)
        self._read_soon(stream)

    def _send(self, name: str, message: pb.GatewayMessage) -> None:
        self._world.tell("%s to %s: %s", self.name, name, _words(message))
        end = self.links[name].first
        end.send(message)
        if message.HasField("cancel") and self._world.chance(0.2):
            end.send(message)  # a cancel may come twice

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (due_s := self._recovery.next_s) is not None:
            self._timer = self._world.at(max(due_s, self._world.now_s), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self.is_alive:
            self._do(self._recovery.tick(self._world.now_s))


def _words(message: pb.GatewayMessage) -> str:
    if message.HasField("submit"):
        return f"submit {message.submit.key} of {message.submit.request_id} behind {len(message.submit.output_ids)}"
    return f"cancel {message.cancel.key}" if message.HasField("cancel") else str(message)


def is_internal(error: MullError) -> bool:
    """Whether a client is told INTERNAL."""
    return isinstance(error, EngineError)
