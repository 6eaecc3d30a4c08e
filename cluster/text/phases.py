"""Splits the tokens of a generation into thoughts and answer.

Hop 11. Token ids move the phase, never a search in the text, and only generated ones: a tag quoted in the prompt
or spelt out letter by letter stays text. The closing tag is in no text, an opening tag that the model writes first is
left out too. Newlines directly around the thoughts and the answer are dropped, as the model cards' snippet does with
`strip("\\n")`: leading ones at once, trailing ones are held back until text follows.
Knows nothing of events, sequence numbers or logprobs.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.text.detokenizer import Detokenizer

THINK_START = "<think>"
THINK_END = "</think>"


class Phase(enum.Enum):
    """Where a generation is."""

    THINKING = "thinking"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Delta:
    """Tokens [start, stop) of the push belong to `phase`, and `text` is what became certain with them.

    Either may be empty, not both.
    """

    phase: Phase
    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ThoughtsClosed:
    """Token `index` of the push was the closing tag."""

    index: int


Piece = Delta | ThoughtsClosed


@dataclass(frozen=True)
class ThinkTags:
    """Ids of `<think>` and `</think>`; None where the tokenizer has no such token."""

    open_id: int | None
    close_id: int | None


class NewlineTrimmer:
    """`strip("\\n")` on a stream."""

    def __init__(self) -> None:
        self.is_empty = True
        self._num_held = 0

    def push(self, text: str) -> str:
        """`text` with the newlines held before it, without those that may turn out to be the last."""
        if self.is_empty:
            text = text.lstrip("\n")
        body = text.rstrip("\n")
        if not body:
            self._num_held += len(text)
            return ""
        released = "\n" * self._num_held + body
        self._num_held = len(text) - len(body)
        self.is_empty = False
        return released


class PhaseSplitter:
    """The phase of one token stream."""

    def __init__(self, tags: ThinkTags, detokenizer: Detokenizer, *, starts_thinking: bool) -> None:
        self.phase = Phase.THINKING if starts_thinking else Phase.ANSWER
        self._tags = tags
        self._detokenizer = detokenizer
        self._trimmer = NewlineTrimmer()
        self._may_open = True

    def push(self, token_ids: Sequence[int]) -> list[Piece]:
        """The pieces of these tokens, in order; each token is in exactly one of them."""
        tags = self._tags
        if tags.close_id not in token_ids and tags.open_id not in token_ids:
            return [Delta(self.phase, self._text(token_ids), 0, len(token_ids))] if token_ids else []
        return self._push_with_tags(token_ids)

    def finish(self) -> str:
        """The last piece of text of the current phase, once no more tokens come."""
        return self._trimmer.push(self._detokenizer.flush())

    def _push_with_tags(self, token_ids: Sequence[int]) -> list[Piece]:
        pieces: list[Piece] = []
        start = 0
        for index, token_id in enumerate(token_ids):
            if token_id == self._tags.close_id:
                pieces += self._on_closing_tag(token_ids, start, index)
                start = index + 1
            elif token_id == self._tags.open_id and self._may_open and self._trimmer.is_empty:
                delta = self._on_opening_tag(token_ids, start, index)
                pieces.append(delta)
                start = delta.stop
        if start < len(token_ids):
            pieces.append(Delta(self.phase, self._text(token_ids[start:]), start, len(token_ids)))
        return [
            piece for piece in pieces if isinstance(piece, ThoughtsClosed) or piece.text or piece.start < piece.stop
        ]

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._trimmer.push(self._detokenizer.push(token_ids))

    def _on_closing_tag(self, token_ids: Sequence[int], start: int, index: int) -> list[Piece]:
        text = self._text(token_ids[start:index]) + self.finish()
        self._may_open = False
        if self.phase is Phase.ANSWER:
            return [Delta(Phase.ANSWER, text, start, index + 1)]
        self.phase = Phase.ANSWER
        self._trimmer = NewlineTrimmer()
        return [Delta(Phase.THINKING, text, start, index), ThoughtsClosed(index)]

    def _on_opening_tag(self, token_ids: Sequence[int], start: int, index: int) -> Delta:
        """Without text before it the tag opens the thoughts and is dropped; else it is text of the next piece."""
        text = self._text(token_ids[start:index])
        if not self._trimmer.is_empty or self._detokenizer.is_pending:
            return Delta(self.phase, text, start, index)
        self.phase = Phase.THINKING
        self._trimmer = NewlineTrimmer()
        return Delta(Phase.THINKING, "", start, index + 1)
