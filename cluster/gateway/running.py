"""RunningChoice: one of a request's generations from its submission to its end.

Between hops 4 and 11: takes from its mailbox, gives events, tells the metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.gateway.generation import Generation
from cluster.gateway.mailbox import Mailbox
from cluster.gateway.resumption import MissingEvents
from cluster.metrics.request_timer import RequestTimer
from mull.v1 import generation_pb2 as pb


class RunningChoice:
    """A generation that has a mailbox."""

    def __init__(
        self, generation: Generation, mailbox: Mailbox, timer: RequestTimer, missing: MissingEvents | None
    ) -> None:
        """`missing`: what the client lacks; None: it has nothing yet."""
        self.mailbox = mailbox
        self.num_taken = 0
        """Tokens that the last `take` found."""
        self._generation = generation
        self._thinks = generation.thinking_ended is None
        self._timer = timer
        self._missing = missing

    @property
    def has_finished(self) -> bool:
        """Its last event was given out."""
        return self._generation.finished is not None

    def take(self) -> list[pb.GenerateEvent]:
        """The events of what has come. Raises the error that ended the generation."""
        generation, timer = self._generation, self._timer
        delivery = self.mailbox.take()
        self.num_taken = len(delivery.token_ids)
        events = generation.accept(delivery)
        if delivery.cached_tokens is not None:
            timer.on_admitted(generation.num_prompt_tokens, delivery.cached_tokens)
        timer.on_tokens(generation.num_thinking_tokens, generation.num_answer_tokens)
        if self._thinks and (ended := generation.thinking_ended) is not None:
            self._thinks = False
            timer.on_thinking_ended(_label(pb.ThinkingEnded.Reason.Name(ended.reason)), len(delivery.forced))
        if (finished := generation.finished) is not None:
            timer.on_finished(_label(pb.Finished.Reason.Name(finished.reason)), generation.phase.value)
        return events if self._missing is None else self._missing.of(events)


def _label(enum_name: str) -> str:
    """REASON_STOP → stop."""
    return enum_name.removeprefix("REASON_").lower()


@dataclass
class RunningRequest:
    """All of a request's generations."""

    generations: list[Generation] = field(default_factory=list)
    choices: list[RunningChoice] = field(default_factory=list)
    """Those that are not over."""
    events: list[pb.GenerateEvent] = field(default_factory=list)
    """What comes before any of them goes on."""
