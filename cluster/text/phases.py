"""Splits the tokens of a generation into thoughts and answer.

Hop 11. Token ids move the phase, never a search in the text, and only generated ones: a tag quoted in the prompt
or spelt out letter by letter stays text. The closing tag is in no text, an opening tag that the model writes first is
left out too. Newlines directly around the thoughts and the answer are dropped, as the model cards' snippet does with
`strip("\\n")`: leading ones at once, trailing ones are held back until text follows.
Knows nothing of events, sequence numbers or logprobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.text.answer import AnswerReader, AnswerRules
from cluster.text.detokenizer import Detokenizer
from cluster.text.newlines import NewlineTrimmer
from cluster.text.pieces import Delta, Phase, Piece, ThoughtsClosed, join_pieces

THINK_START = "<think>"
THINK_END = "</think>"


@dataclass(frozen=True)
class ThinkTags:
    """Ids of `<think>` and `</think>`; None where the tokenizer has no such token."""

    open_id: int | None
    close_id: int | None


class PhaseSplitter:
    """The phase of one token stream."""

    def __init__(
        self, tags: ThinkTags, detokenizer: Detokenizer, *, starts_thinking: bool, rules: AnswerRules | None = None
    ) -> None:
        self.phase = Phase.THINKING if starts_thinking else Phase.ANSWER
        self.answer = AnswerReader(rules or AnswerRules(), detokenizer, tags.close_id)
        self._tags = tags
        self._detokenizer = detokenizer
        self._trimmer = NewlineTrimmer()
        self._may_open = True
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int]) -> list[Piece]:
        """The pieces of these tokens, in order. Some of a tool call may be held back; past the end all are ignored."""
        if not self._may_open or self._tags.open_id not in token_ids:
            return self._push(token_ids)
        pieces: list[Piece] = []
        start = 0
        for index, token_id in enumerate(token_ids):
            if token_id == self._tags.open_id:
                pieces += self._push(token_ids[start:index])
                start = index
                if self._may_open and self._is_blank:
                    self.phase = Phase.THINKING
                    self._num_tokens += 1
                    pieces.append(Delta(Phase.THINKING, "", 1))
                    start = index + 1
        return join_pieces([*pieces, *self._push(token_ids[start:])])

    def finish(self) -> list[Piece]:
        """The last pieces, once no more tokens come."""
        if self.phase is Phase.ANSWER:
            return self.answer.finish()
        return join_pieces([Delta(Phase.THINKING, self._trimmer.push(self._detokenizer.flush()), 0)])

    @property
    def _is_blank(self) -> bool:
        """Whether nothing but newlines came."""
        if self.phase is Phase.ANSWER:
            return self.answer.is_blank
        return self._trimmer.is_empty and not self._detokenizer.is_pending

    def _push(self, token_ids: Sequence[int]) -> list[Piece]:
        if not token_ids:
            return []
        position = self._num_tokens
        self._num_tokens += len(token_ids)
        if self.phase is Phase.ANSWER:
            self._may_open = self._may_open and self._tags.close_id not in token_ids
            return self.answer.push(token_ids, position)
        close_id = self._tags.close_id
        if close_id is None or close_id not in token_ids:
            return [Delta(Phase.THINKING, self._trimmer.push(self._detokenizer.push(token_ids)), len(token_ids))]
        return self._close(token_ids, list(token_ids).index(close_id), position)

    def _close(self, token_ids: Sequence[int], index: int, position: int) -> list[Piece]:
        text = self._trimmer.push(self._detokenizer.push(token_ids[:index]) + self._detokenizer.flush())
        self.phase, self._may_open = Phase.ANSWER, False
        pieces: list[Piece] = [Delta(Phase.THINKING, text, index), ThoughtsClosed()]
        if rest := token_ids[index + 1 :]:
            pieces += self.answer.push(rest, position + index + 1)
        return join_pieces(pieces)
