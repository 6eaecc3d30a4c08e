"""Where each sequence runs, and where it goes on when that copy is lost: the gateway's half of recovery.

Hop 3, and a pure state machine: events in (a copy is there, says how it is, is lost; an update; a client that leaves;
the time), actions out (send, deliver, fail). No clock, socket or await: `copies.py` drives it in the product, a virtual
clock and network in simulation. Knows nothing of text or clients.

A flight, one sequence under way, is at most at one copy at a time, under a key of its own there: what an earlier copy
still had on the way is told by its key, and dropped. It keeps the output so far, from which any copy goes on.
"""

from __future__ import annotations

import enum
import itertools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.errors import MullError, NotReady, Overloaded
from cluster.gateway.affinity import CopyLoad, prefix_hashes
from cluster.gateway.choice import Choice
from mull.v1 import router_pb2 as pb

_REFUSALS = (pb.End.REASON_UNAVAILABLE, pb.End.REASON_CANCELLED, pb.End.REASON_OVERLOADED)
"""Ends after which another copy, or a later try, can go on."""


class Loss(enum.Enum):
    """Why a flight needs a copy again."""

    ROUTER_LOST = "router_lost"
    """Its copy was out of reach."""
    ROUTER_DRAINING = "router_draining"
    """Its copy gave it back."""
    CLIENT_RESUMED = "client_resumed"
    """It began in an earlier call, maybe at another gateway."""


@dataclass(frozen=True, kw_only=True)
class ReplayPolicy:
    """How long a flight may be without a copy, and how often it tries, in seconds."""

    timeout_s: float = 600.0
    """Since its last progress; past it the request fails."""
    first_pause_s: float = 0.1
    longest_pause_s: float = 2.0


@dataclass(frozen=True, kw_only=True)
class CopyState:
    """What is known of a copy that is connected."""

    ready: bool
    """It takes work."""
    load: CopyLoad = field(default_factory=CopyLoad)


@dataclass(eq=False, slots=True)
class Flight:
    """One sequence under way."""

    number: int
    """Unique in its gateway."""
    submit: pb.Submit
    """What a copy is asked for, but for the key and the output."""
    output_ids: array[int]
    """All output so far. Four bytes a token: there may be a hundred thousand of them, in a thousand flights."""
    prefix: tuple[int, ...]
    copy: str | None = None
    """Where it runs; None: it waits for a copy."""
    key: int = 0
    """Its name at that copy."""
    was_resumed: bool = False
    """It began in an earlier call."""
    was_admitted: bool = False
    num_replays: int = 0
    num_refused: int = 0
    """Refusals since its last progress."""
    refused_by: set[str] = field(default_factory=set)
    """Copies that are not asked before `retry_s`."""
    paused_s: float | None = None
    """Since when it makes no progress; None: it does, or has not begun."""
    retry_s: float = 0.0
    why: str = ""
    """Why it has no copy."""
    loss: Loss | None = None
    """Since its last progress; None: there was none, or it had not begun."""

    @property
    def has_begun(self) -> bool:
        """Whether there is something to lose."""
        return self.was_resumed or self.was_admitted or len(self.output_ids) > 0


@dataclass(frozen=True, slots=True)
class Send:
    """To a copy, in order with all else that is sent there."""

    copy: str
    message: pb.GatewayMessage


class Deliver(NamedTuple):
    """An update for whoever reads the flight; one with an end is its last. One for nearly every token."""

    flight: Flight
    update: pb.SequenceUpdate


@dataclass(frozen=True, slots=True)
class Fail:
    """The flight is over."""

    flight: Flight
    error: MullError


@dataclass(frozen=True, slots=True)
class Resumed:
    """A flight that had lost its copy makes progress again."""

    flight: Flight
    loss: Loss
    pause_s: float


Action = Send | Deliver | Fail | Resumed


@dataclass(eq=False, slots=True)
class _Copy:
    state: CopyState
    flights: dict[int, Flight] = field(default_factory=dict)
    """By key."""


class Recovery:
    """All flights of one gateway, and the copies that it is connected to."""

    def __init__(self, policy: ReplayPolicy, *, seed: int | None = None) -> None:
        """`seed`: of what is left to chance in the choice of copies; None: every gateway has its own."""
        self.num_replays_total = 0
        self.num_replayed_tokens_total = dict.fromkeys(Loss, 0)
        """Prompt and output of flights that had begun, behind which they went on."""
        self._policy = policy
        self._copies: dict[str, _Copy] = {}
        self._choice = Choice(seed)
        self._waiting: dict[int, Flight] = {}
        """By number: the oldest first."""
        self._numbers = itertools.count(1)
        self._keys = itertools.count(1)

    @property
    def has_ready_copy(self) -> bool:
        """Whether new work can be taken."""
        return any(copy.state.ready for copy in self._copies.values())

    @property
    def num_waiting(self) -> int:
        """Flights without a copy."""
        return len(self._waiting)

    @property
    def next_s(self) -> float | None:
        """When `tick` is due at the latest; None: never."""
        return min((self._due_s(flight) for flight in self._waiting.values()), default=None)

    def flight_of(self, key: int) -> Flight | None:
        """The flight that has this key at a copy now."""
        return next((copy.flights[key] for copy in self._copies.values() if key in copy.flights), None)

    # Copies

    def connected(self, name: str, state: CopyState, now_s: float) -> list[Action]:
        """A copy can be sent to."""
        assert name not in self._copies, f"copy {name} is connected twice"
        self._copies[name] = _Copy(state)
        self._choice.heard(name, state.load if state.ready else None)
        return self._place(now_s)

    def described(self, name: str, state: CopyState, now_s: float) -> list[Action]:
        """A connected copy said how it is."""
        self._copies[name].state = state
        self._choice.heard(name, state.load if state.ready else None)
        return self._place(now_s) if self._waiting else []

    def lost(self, name: str, why: str, now_s: float) -> list[Action]:
        """A copy is out of reach: what ran there goes on elsewhere, or later. One that was not connected is no loss."""
        copy = self._copies.pop(name, None)
        if copy is None:
            return []
        self._choice.lost(name)
        for flight in copy.flights.values():
            self._suspend(flight, why, now_s, Loss.ROUTER_LOST)
        return self._place(now_s)

    # Flights

    def open(self, submit: pb.Submit, now_s: float) -> tuple[Flight, list[Action]]:
        """Take a new sequence. Raises NotReady where no copy is ready."""
        if not self.has_ready_copy:
            raise NotReady("no copy of the model can take work; try again soon")
        flight = self._flight(submit, ())
        return flight, self._place(now_s)

    def resume(self, submit: pb.Submit, now_s: float, output_ids: Iterable[int]) -> tuple[Flight, list[Action]]:
        """Take one that goes on behind this output; it waits for a copy where none is ready."""
        flight = self._flight(submit, output_ids)
        flight.was_resumed, flight.paused_s, flight.loss = True, now_s, Loss.CLIENT_RESUMED
        return flight, self._place(now_s)

    def release(self, flight: Flight) -> list[Action]:
        """Nobody wants more of it: a copy that has it is told. Nothing happens where it is over."""
        self._waiting.pop(flight.number, None)
        name, key = flight.copy, flight.key
        if name is None or not self._leave(flight):
            return []
        return [Send(name, pb.GatewayMessage(cancel=pb.Cancel(key=key)))]

    def set_budget(self, flight: Flight, thinking_budget: int) -> list[Action]:
        """Thinking tokens at most, here and wherever it goes on."""
        flight.submit.thinking_budget = thinking_budget
        if flight.copy is None:
            return []
        message = pb.SetBudget(key=flight.key, thinking_budget=thinking_budget)
        return [Send(flight.copy, pb.GatewayMessage(set_budget=message))]

    def updated(self, name: str, update: pb.SequenceUpdate, now_s: float) -> list[Action]:
        """What a copy has for a key of its; the update is ours to change."""
        copy = self._copies.get(name)
        flight = None if copy is None else copy.flights.get(update.key)
        if flight is None:
            return []
        actions: list[Action] = []
        if update.HasField("admitted"):
            self._admit(flight, update)
        if token_ids := update.token_ids:
            flight.output_ids.extend(token_ids)
            if flight.num_refused or flight.paused_s is not None:
                actions += self._progress(flight, len(token_ids), now_s)
        if not update.HasField("end"):
            return [*actions, Deliver(flight, update)]
        self._leave(flight)
        if update.end.reason not in _REFUSALS:
            return [*actions, Deliver(flight, update)]
        return [*actions, *self._refused(flight, name, update, now_s)]

    def tick(self, now_s: float) -> list[Action]:
        """Time has passed."""
        return self._place(now_s)

    # Inside

    def _flight(self, submit: pb.Submit, output_ids: Iterable[int]) -> Flight:
        prefix = prefix_hashes(submit.prompt_ids, submit.cache_salt)
        flight = Flight(next(self._numbers), submit, array("I", output_ids), prefix)
        self._waiting[flight.number] = flight
        return flight

    def _admit(self, flight: Flight, update: pb.SequenceUpdate) -> None:
        """A reader is told once."""
        if flight.was_admitted:
            update.ClearField("admitted")
            del update.prompt_logprobs[:]
        flight.was_admitted = True

    def _progress(self, flight: Flight, num_new_tokens: int, now_s: float) -> list[Action]:
        flight.num_refused = 0
        flight.refused_by.clear()
        paused_s, flight.paused_s = flight.paused_s, None
        loss, flight.loss = flight.loss, None
        if paused_s is None or loss is None:
            return []
        num_replayed = len(flight.submit.prompt_ids) + len(flight.output_ids) - num_new_tokens
        self.num_replayed_tokens_total[loss] += num_replayed
        return [] if loss is Loss.CLIENT_RESUMED else [Resumed(flight, loss, now_s - paused_s)]

    def _refused(self, flight: Flight, name: str, update: pb.SequenceUpdate, now_s: float) -> list[Action]:
        """A copy gave it back. Where every queue is full, what has not begun fails; the rest is not given up for it."""
        reason, message = update.end.reason, update.end.message
        update.ClearField("end")
        delivered = [Deliver(flight, update)] if update.token_ids or update.HasField("admitted") else []
        flight.refused_by.add(name)
        others = [other for other, copy in self._copies.items() if copy.state.ready and other not in flight.refused_by]
        if reason == pb.End.REASON_OVERLOADED and not flight.has_begun and not others:
            return [*delivered, Fail(flight, Overloaded(message))]
        policy = self._policy
        pause_s = min(policy.longest_pause_s, policy.first_pause_s * 2.0 ** min(flight.num_refused, 30))
        flight.num_refused += 1
        flight.retry_s = now_s + pause_s
        self._suspend(flight, message, now_s, flight.loss or Loss.ROUTER_DRAINING)
        return [*delivered, *self._place(now_s)]

    def _suspend(self, flight: Flight, why: str, now_s: float, loss: Loss) -> None:
        flight.copy, flight.why = None, why
        if flight.has_begun:
            flight.loss = loss
        flight.paused_s = now_s if flight.paused_s is None else flight.paused_s
        self._waiting[flight.number] = flight

    def _leave(self, flight: Flight) -> bool:
        """Its copy has it no longer. Whether a copy had it."""
        name, flight.copy = flight.copy or "", None
        copy = self._copies.get(name)
        if copy is None or copy.flights.pop(flight.key, None) is None:
            return False
        self._choice.left(name)
        return True

    def _place(self, now_s: float) -> list[Action]:
        """Send what waits to copies, as far as there are any; give up what has waited too long."""
        actions: list[Action] = []
        for number, flight in sorted(self._waiting.items()):
            if flight.refused_by and flight.retry_s <= now_s:
                flight.refused_by.clear()
            name = self._choose(flight)
            if name is not None:
                del self._waiting[number]
                actions.append(self._send(flight, name))
            elif flight.paused_s is not None and now_s - flight.paused_s >= self._policy.timeout_s:
                del self._waiting[number]
                actions.append(Fail(flight, _given_up(flight, self._policy.timeout_s)))
        return actions

    def _choose(self, flight: Flight) -> str | None:
        num_tokens = len(flight.submit.prompt_ids) + len(flight.output_ids)
        return self._choice.choose(num_tokens, flight.prefix, flight.refused_by)

    def _send(self, flight: Flight, name: str) -> Send:
        if flight.key:
            flight.num_replays += 1
            self.num_replays_total += 1
        flight.copy, flight.key = name, next(self._keys)
        self._copies[name].flights[flight.key] = flight
        self._choice.sent(name, flight.prefix)
        message = pb.GatewayMessage(submit=flight.submit)
        message.submit.key = flight.key
        message.submit.output_ids.extend(flight.output_ids)
        if flight.was_admitted:
            message.submit.ClearField("num_prompt_logprobs")
        return Send(name, message)

    def _due_s(self, flight: Flight) -> float:
        since_s = flight.paused_s if flight.paused_s is not None else flight.retry_s
        gives_up_s = since_s + self._policy.timeout_s
        return min(flight.retry_s, gives_up_s) if flight.refused_by else gives_up_s


def _given_up(flight: Flight, timeout_s: float) -> NotReady:
    why = flight.why or "none was ready"
    return NotReady(f"no copy of the model could take the request for {timeout_s:g} s ({why}); send it again later")
