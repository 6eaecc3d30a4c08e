"""GenerateRequest.resume: what a client holds of a stream that was cut, checked.

Hop 2, pure. Raises InvalidRequest. Knows nothing of events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import InvalidRequest
from cluster.gateway.stopping import check_vocabulary
from mull.v1 import generation_pb2 as pb
from workers.step import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldChoice:
    """One generation as far as the client has it."""

    token_ids: Sequence[int] = ()
    text_bytes: int = 0
    """Of all its texts, in UTF-8."""
    thinking_ended: bool = False
    next_sequence: int = 0
    finished: bool = False


def read_resume(
    request: pb.GenerateRequest, *, n: int, sampling: SamplingParams, max_tokens: int, vocab_size: int
) -> Mapping[int, HeldChoice]:
    """What is held, by choice; empty where the request is no resumption."""
    if not request.HasField("resume"):
        return {}
    if sampling.temperature > 0 and not request.sampling.HasField("seed"):
        raise InvalidRequest(
            "sampling.seed: missing, and another seed would go on with other tokens; send the one that Started told",
            field="sampling.seed",
        )
    held: dict[int, HeldChoice] = {}
    for index, choice in enumerate(request.resume.choices):
        field = f"resume.choices[{index}]"
        if choice.choice >= n or choice.choice in held:
            why = "is there twice" if choice.choice in held else f"is none of the {n} that the request asks for"
            raise InvalidRequest(f"{field}.choice: {choice.choice} {why}; correct it", field=f"{field}.choice")
        held[choice.choice] = _held(choice, field, max_tokens, vocab_size)
    # One that has nothing starts anew, as those that are not there.
    return {number: choice for number, choice in held.items() if choice.next_sequence}


def _held(choice: pb.ResumedChoice, field: str, max_tokens: int, vocab_size: int) -> HeldChoice:
    check_vocabulary(choice.token_ids, vocab_size, f"{field}.token_ids")
    if len(choice.token_ids) > max_tokens:
        raise InvalidRequest(
            f"{field}.token_ids: {len(choice.token_ids)} are more than the {max_tokens} that may come; correct them",
            field=f"{field}.token_ids",
        )
    if not choice.next_sequence and (choice.token_ids or choice.text_bytes or choice.thinking_ended or choice.finished):
        raise InvalidRequest(
            f"{field}.next_sequence: 0, though events have come; send one more than the last event's sequence",
            field=f"{field}.next_sequence",
        )
    return HeldChoice(
        token_ids=list(choice.token_ids),
        text_bytes=choice.text_bytes,
        thinking_ended=choice.thinking_ended,
        next_sequence=choice.next_sequence,
        finished=choice.finished,
    )
