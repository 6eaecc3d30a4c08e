"""A client in virtual time: asks, reads, and after any loss asks again for what it lacks.

It checks every token when it comes: each is the next one of the undisturbed output, never another, never twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.simulation.gateway import SimGateway, is_internal
from tests.simulation.network import Connection, End
from tests.simulation.streams import Ask, BrokenPromise, Ended, Failed, Request, Tokens
from tests.simulation.world import World

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.005, 0.060


class SimClient:
    """One stream, from its first call to its end."""

    def __init__(
        self,
        world: World,
        name: str,
        request: Request,
        gateways: Callable[[], list[SimGateway]],
        *,
        leaves_s: float | None,
        is_cut_behind: int | None,
        on_done: Callable[[], object],
    ) -> None:
        """`gateways`: those that can be called now. `leaves_s`: when it loses interest; None: never.

        `is_cut_behind`: so many tokens are here when its connection breaks, once; None: only where a fault hits it.
        """
        self.name, self.request = name, request
        self._on_done = on_done
        self.is_done = False
        self.was_refused_for_good = False
        """It was told INTERNAL."""
        self.output_ids: list[int] = []
        self.num_calls = 0
        self.num_resumed = 0
        """Calls that went on behind tokens that were here."""
        self.num_refusals = 0
        """How often it was told to come again."""
        self.line: Connection | None = None
        self._world, self._gateways = world, gateways
        self._is_cut_behind = is_cut_behind
        self._pause_s = FIRST_PAUSE_S
        if leaves_s is not None:
            world.after(leaves_s, self._leave)

    def call(self) -> None:
        """Ask any gateway, behind what is here already."""
        if self.is_done:
            return
        world, gateways = self._world, self._gateways()
        if not gateways:
            self._call_again()
            return
        gateway = world.random.choice(gateways)
        self.num_calls += 1
        self.num_resumed += bool(self.output_ids)
        world.tell("%s calls %s behind %d tokens", self.name, gateway.name, len(self.output_ids))
        line = self.line = Connection(world, self.name, gateway.name)
        gateway.accept(line)
        end = line.first
        end.on_message = lambda message: self._take(end, message)
        end.on_broken = lambda: self._on_broken(end)
        end.send(Ask(self.request, list(self.output_ids)))

    def _take(self, end: End, message: Any) -> None:
        if self.is_done:
            return
        match message:
            case Tokens():
                self._extend(message)
            case Ended(reason):
                self._check_whole(reason)
                self._stop(end)
            case Failed(error) if is_internal(error):
                self._world.tell("%s is told: %s", self.name, error)
                self.was_refused_for_good = True
                self._stop(end)
            case Failed(error):
                self.num_refusals += 1
                self._world.tell("%s is told: %s", self.name, error)
                end.close()
                self._call_again()

    def _extend(self, tokens: Tokens) -> None:
        here, expected = self.output_ids, self.request.undisturbed[0]
        if tokens.start != len(here):
            raise BrokenPromise(f"{self.name} has {len(here)} tokens and is sent those from {tokens.start} on")
        here += tokens.token_ids
        if here != expected[: len(here)]:
            raise BrokenPromise(f"{self.name} has {here}, undisturbed it is {expected}")
        self._check_logprobs(tokens)
        self._pause_s = FIRST_PAUSE_S
        if self._is_cut_behind is not None and len(here) >= self._is_cut_behind and self.line is not None:
            self._is_cut_behind = None
            self.line.break_()

    def _check_logprobs(self, tokens: Tokens) -> None:
        """A sampled token's is its id, negated; a forced one's is zero."""
        if self.request.message.sampling.HasField("num_logprobs"):
            pairs = list(zip(tokens.token_ids, tokens.logprobs, strict=True))
            if any(logprob not in (-token_id, 0.0) for token_id, logprob in pairs):
                raise BrokenPromise(f"{self.name} has logprobs of other tokens: {pairs}")

    def _check_whole(self, reason: int) -> None:
        expected_ids, expected_reason = self.request.undisturbed
        if (self.output_ids, reason) != (expected_ids, expected_reason):
            raise BrokenPromise(
                f"{self.name} ends with {self.output_ids}, {reason}; "
                f"undisturbed it is {expected_ids}, {expected_reason}"
            )

    def _on_broken(self, end: End) -> None:
        if not self.is_done and self.line is not None and end is self.line.first:
            self._call_again()

    def _call_again(self) -> None:
        self.line = None
        self._world.after(self._pause_s * self._world.between(0.5, 1.0), self.call)
        self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s)

    def _leave(self) -> None:
        if not self.is_done:
            self._world.tell("%s leaves", self.name)
            self._finish()
            if self.line is not None:
                self.line.first.close()

    def _stop(self, end: End) -> None:
        self._finish()
        end.close()

    def _finish(self) -> None:
        self.is_done = True
        self._on_done()
