"""What a token stream is made of: pieces of thoughts, answer and tool calls.

Every piece takes the next `num_tokens` tokens of the stream, so that each token is in exactly one piece, in order.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Phase(enum.Enum):
    """Where a generation is."""

    THINKING = "thinking"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Delta:
    """Text of a phase that became certain with these tokens. Either may be empty, not both."""

    phase: Phase
    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ThoughtsClosed:
    """The closing tag."""

    num_tokens: int = 1


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """The name of call `index` is known."""

    index: int
    name: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the JSON text of call `index`'s arguments; may be empty."""

    index: int
    text: str
    num_tokens: int


Piece = Delta | ThoughtsClosed | ToolCallStarted | ToolCallArguments


def join_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """The same with neighbours of one kind made one, and without empty deltas."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, Delta) and not (piece.text or piece.num_tokens):
            continue
        if joined and (both := _join(joined[-1], piece)) is not None:
            joined[-1] = both
        else:
            joined.append(piece)
    return joined


def _join(first: Piece, second: Piece) -> Piece | None:
    """Both as one; None where they differ in more than text and tokens."""
    match first, second:
        case Delta(phase, text, num_tokens), Delta(also, more) if phase is also:
            return Delta(phase, text + more, num_tokens + second.num_tokens)
        case ToolCallArguments(index, text, num_tokens), ToolCallArguments(also, more) if index == also:
            return ToolCallArguments(index, text + more, num_tokens + second.num_tokens)
    return None
