"""A generation that goes on with what a client holds: its state is rebuilt, and what the client has is not sent again.

Hop 11, pure. All tokens go through a Generation from the first one on, however the events were cut when they came
first. Its texts depend on the tokens alone, so what is held, so many tokens and so many bytes of text, can be taken
off the front of its events. What is left is numbered on. Knows nothing of Routers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.errors import InvalidRequest
from cluster.gateway.generation import Generation
from cluster.gateway.mailbox import Delivery
from cluster.gateway.requests import PreparedRequest
from cluster.gateway.resume_options import HeldChoice
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2


class MissingEvents:
    """The events of one generation that a client lacks."""

    def __init__(self, held: HeldChoice) -> None:
        self._has_started = held.next_sequence > 0
        self._num_tokens = len(held.token_ids)
        self._num_bytes = held.text_bytes
        self._has_thoughts = held.thinking_ended
        self._sequence = held.next_sequence

    def of(self, events: Iterable[pb.GenerateEvent]) -> list[pb.GenerateEvent]:
        """Those of the generation's next events, or the parts of them, that are missing; they are ours to change."""
        missing = [event for event in events if not self._is_held(event)]
        for event in missing:
            event.sequence = self._sequence
            self._sequence += 1
        return missing

    def _is_held(self, event: pb.GenerateEvent) -> bool:
        """Whether all of it has come; what has is taken off."""
        match event.WhichOneof("event"):
            case "started":
                return self._has_started
            case "thinking_delta":
                delta = event.thinking_delta
                skipped = self._skip_tokens(delta)
                delta.text, cut = self._skip_text(delta.text)
                return (skipped or cut) and not (delta.text or delta.token_ids)
            case "answer_delta":
                answer = event.answer_delta
                skipped = self._skip_tokens(answer)
                answer.text, cut = self._skip_text(answer.text)
                return (skipped or cut) and not (answer.text or answer.token_ids)
            case "tool_call_arguments_delta":
                arguments = event.tool_call_arguments_delta
                skipped = self._skip_tokens(arguments)
                arguments.arguments_json, cut = self._skip_text(arguments.arguments_json)
                return (skipped or cut) and not (arguments.arguments_json or arguments.token_ids)
            case "thinking_ended":
                return self._skip_tokens(event.thinking_ended) or self._has_thoughts
            case "tool_call_start":
                return self._skip_tokens(event.tool_call_start) and not event.tool_call_start.token_ids
            case _:
                return False

    def _skip_tokens(
        self, body: pb.ThinkingDelta | pb.ThinkingEnded | pb.AnswerDelta | pb.ToolCallStart | pb.ToolCallArgumentsDelta
    ) -> bool:
        count = min(self._num_tokens, len(body.token_ids))
        self._num_tokens -= count
        del body.token_ids[:count]
        del body.logprobs[:count]
        return count > 0

    def _skip_text(self, text: str) -> tuple[str, bool]:
        """The text without what is held of it, and whether some of it was."""
        if not self._num_bytes or not text:
            return text, False
        encoded = text.encode()
        count = min(self._num_bytes, len(encoded))
        self._num_bytes -= count
        return encoded[count:].decode(errors="replace"), True


def check_repeatable(request: PreparedRequest) -> None:
    """Raises InvalidRequest where the events that a client has cannot all be made again."""
    if request.sampling.num_logprobs is not None and any(has.token_ids for has in request.held.values()):
        raise InvalidRequest(
            "sampling.logprobs: those of tokens that came earlier are not kept; call Generate for the others",
            field="sampling.logprobs",
        )


def rebuild(generation: Generation, held: HeldChoice, request: PreparedRequest, choice: int) -> list[pb.GenerateEvent]:
    """Put what is held through a new generation, which may end by that. Returns its events, all of them.

    Raises InvalidRequest where tokens come after an end.
    """
    ids = list(held.token_ids)
    # The Router tells the logprobs of new tokens only; those of what is held are with the client.
    logprobs = [router_pb2.RouterLogprobs()] * len(ids) if request.sampling.num_logprobs is not None else []
    events = generation.accept(Delivery(None, ids, logprobs, _finish(ids, request), forced=forced_tokens(ids, request)))
    num_taken = generation.num_thinking_tokens + generation.num_answer_tokens + generation.num_unsent_tokens
    ends = (
        index for index, id_ in enumerate(ids[:-1]) if id_ in request.stop_token_ids and index >= request.min_tokens
    )
    end = next(ends, num_taken - 1 if num_taken < len(ids) else None)
    if end is not None:
        field = f"resume.choices[{choice}].token_ids"
        raise InvalidRequest(
            f"{field}: {len(ids)} tokens, but the generation is over with the token at {end}; correct them", field=field
        )
    return events


def _finish(ids: Sequence[int], request: PreparedRequest) -> router_pb2.End.Reason | None:
    """How these tokens end the sequence, as the Router sees it."""
    if ids and ids[-1] in request.stop_token_ids and len(ids) > request.min_tokens:
        return router_pb2.End.REASON_STOP
    return router_pb2.End.REASON_LENGTH if len(ids) >= request.max_tokens else None


def forced_tokens(ids: Sequence[int], request: PreparedRequest) -> range:
    """Where the tokens are that were forced when the thinking budget was used up: the closing phrase, or its begin."""
    if request.thinking_budget is None or not request.starts_thinking:
        return range(0)
    start = request.thinking_budget
    begun = ids[start : start + len(request.close_thinking_ids)]
    if not begun or tuple(begun) != request.close_thinking_ids[: len(begun)]:
        return range(0)
    return range(start, start + len(begun))
