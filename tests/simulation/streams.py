"""What clients ask for, what they are told, and what they must get in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cluster.errors import MullError
from cluster.router.sequence import FinishReason
from cluster.router.wire import ModelInfo, to_request
from mull.v1 import router_pb2 as pb
from tests.fakes import generate_alone

STOP_TEXT = pb.End.REASON_UNSPECIFIED
"""No reason of a Router: the gateway itself has ended the output."""
_ENDS = {FinishReason.STOP: pb.End.REASON_STOP, FinishReason.LENGTH: pb.End.REASON_LENGTH}


class BrokenPromise(AssertionError):
    """Something was not as it had to be."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One generation; the oracle knows its output."""

    message: pb.Submit
    model: ModelInfo
    context_limit: int
    sampled_vocab_size: int
    reach: int | None
    stop_text_ids: tuple[int, ...] = ()
    """Where the output ends with these, the gateway has seen a stop text and cancels the rest."""
    is_poison: bool = False

    def submit(self) -> pb.Submit:
        """A message of its own: recovery writes into it."""
        copy = pb.Submit()
        copy.CopyFrom(self.message)
        return copy

    @cached_property
    def undisturbed(self) -> tuple[list[int], int]:
        """Its output, and how it ends."""
        ids, finish = self._of_the_model
        wanted = self.until_stop_text([], ids)
        return (wanted, STOP_TEXT) if self.has_stop_text(wanted) else (ids, _ENDS[finish])

    @cached_property
    def forced(self) -> range:
        """Where in the output the tokens are that close its thoughts at the end of the budget."""
        message, output_ids = self.message, self._of_the_model[0]
        budget, tag = message.thinking_budget, self.model.think_end_id
        is_limited = message.starts_thinking and message.HasField("thinking_budget")
        if not is_limited or tag in output_ids[:budget] or len(output_ids) <= budget:
            return range(0)
        return range(budget, min(len(output_ids), budget + len(message.close_thinking_ids)))

    @cached_property
    def _of_the_model(self) -> tuple[list[int], FinishReason]:
        request = to_request(self.message, 0, self.model)
        return generate_alone(
            request, context_limit=self.context_limit, vocab_size=self.sampled_vocab_size, reach=self.reach
        )

    def has_stop_text(self, output_ids: Sequence[int]) -> bool:
        stop = self.stop_text_ids
        return bool(stop) and tuple(output_ids[-len(stop) :]) == stop

    def until_stop_text(self, output_ids: Sequence[int], more: Sequence[int]) -> list[int]:
        """Of `more`, what comes before the end that a stop text makes."""
        if not self.stop_text_ids:
            return list(more)
        taken: list[int] = []
        for token_id in more:
            taken.append(token_id)
            if self.has_stop_text([*output_ids, *taken]):
                break
        return taken

    def finish_of(self, output_ids: Sequence[int]) -> int | None:
        """What a gateway says of an output that has ended already; None for one that goes on."""
        if not output_ids:
            return None
        if self.has_stop_text(output_ids):
            return STOP_TEXT
        is_early = len(output_ids) <= self.message.min_tokens
        if output_ids[-1] in self.message.stop_token_ids and not is_early:
            return pb.End.REASON_STOP
        room = min(self.message.max_tokens, self.context_limit - len(self.message.prompt_ids))
        return pb.End.REASON_LENGTH if len(output_ids) >= room else None


@dataclass(frozen=True)
class Ask:
    """Client to gateway: generate, behind what the client has."""

    request: Request
    output_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Tokens:
    """Gateway to client: output from `start` on."""

    start: int
    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Ended:
    """Gateway to client: that was all. `reason`: an End.Reason, or STOP_TEXT."""

    reason: int


@dataclass(frozen=True)
class Failed:
    """Gateway to client: a status other than OK."""

    error: MullError
