"""Splits the tokens of an answer into text and tool calls, and ends it at stop texts.

Hop 11. Tool calls begin and end by token ids, never by a search in the text. A call that cannot be read is text of
the answer, markup and all, with a note. Stop texts are looked for in text alone, not in calls, before the newlines at
its end are dropped. Knows nothing of thoughts, events or logprobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.text.detokenizer import Detokenizer
from cluster.text.newlines import NewlineTrimmer
from cluster.text.pieces import Delta, Phase, Piece, ToolCallArguments, ToolCallStarted, join_pieces
from cluster.text.stops import StopMatcher
from cluster.text.tools import TOOL_CALL_END, TOOL_CALL_START, CallError, ToolCallReader


@dataclass(frozen=True)
class ToolTags:
    """Ids of `<tool_call>` and `</tool_call>`."""

    open_id: int
    close_id: int


@dataclass(frozen=True, kw_only=True)
class AnswerRules:
    """What an answer may hold and what ends it."""

    stops: tuple[str, ...] = ()
    min_tokens: int = 0
    """A stop text that is complete with one of the first so many tokens of the output does not count."""
    tool_tags: ToolTags | None = None
    """None: markup is text."""
    max_tool_calls: int | None = None
    """The answer is over after so many."""


class AnswerReader:
    """The answer of one token stream."""

    def __init__(self, rules: AnswerRules, detokenizer: Detokenizer, dropped_id: int | None) -> None:
        """`dropped_id`: a token that is in no text, the closing tag of thoughts that are over."""
        self.num_tool_calls = 0
        """Calls that are over and could be read."""
        self.notes: list[str] = []
        self._rules = rules
        self._detokenizer = detokenizer
        self._dropped_id = dropped_id
        self._matcher = StopMatcher(rules.stops)
        self._trimmer = NewlineTrimmer()
        self._is_blank = True
        self._call: _OpenCall | None = None
        self._next_index = 0
        marks = set() if rules.tool_tags is None else {rules.tool_tags.open_id, rules.tool_tags.close_id}
        self._marks = frozenset(marks if dropped_id is None else marks | {dropped_id})

    @property
    def stop(self) -> str | None:
        """The stop text that came."""
        return self._matcher.found

    @property
    def is_over(self) -> bool:
        """No more tokens count."""
        return self.stop is not None or self.num_tool_calls == self._rules.max_tool_calls

    @property
    def is_blank(self) -> bool:
        """Nothing but newlines came, and no call."""
        has_called = self._call is not None or self._next_index > 0
        return self._is_blank and not has_called and not self._detokenizer.is_pending

    def push(self, token_ids: Sequence[int], position: int) -> list[Piece]:
        """The pieces of these tokens, the first being token `position` of the output. Past a stop all is ignored."""
        if self.is_over:
            return []
        if self._call is None and not self._rules.stops and self._marks.isdisjoint(token_ids):
            return [Delta(Phase.ANSWER, self._visible(self._detokenizer.push(token_ids)), len(token_ids))]
        pieces: list[Piece] = []
        for number, token_id in enumerate(token_ids, start=position + 1):
            pieces += self._push_one(token_id, number)
            if self.is_over:
                break
        return join_pieces(pieces)

    def finish(self) -> list[Piece]:
        """What is left once no more tokens come."""
        pieces = [] if self._call is None else self._end_call(self._call, is_closed=False)
        return join_pieces([*pieces, Delta(Phase.ANSWER, self._rest_of_text(), 0)])

    def _push_one(self, token_id: int, number: int) -> list[Piece]:
        tags = self._rules.tool_tags
        if tags is not None and token_id == tags.open_id:
            cut = [] if self._call is None else self._end_call(self._call, is_closed=False)
            text = "" if cut else self._rest_of_text()
            self._call = _OpenCall(ToolCallReader())
            return [*cut, Delta(Phase.ANSWER, text, 0)]
        if self._call is not None:
            if tags is not None and token_id == tags.close_id:
                self._call.num_held += 1
                return self._end_call(self._call, is_closed=True)
            return self._push_into_call(self._call, self._detokenizer.push([token_id]))
        if token_id == self._dropped_id:
            return [Delta(Phase.ANSWER, self._visible(self._matched(self._detokenizer.flush(), number)), 1)]
        return [Delta(Phase.ANSWER, self._visible(self._matched(self._detokenizer.push([token_id]), number)), 1)]

    def _push_into_call(self, call: _OpenCall, text: str) -> list[Piece]:
        """One more token of a call. Until its name is known its tokens are held."""
        piece = call.reader.push(text)
        call.num_held += 1
        if call.reader.name is None:
            return []
        pieces: list[Piece] = []
        if call.index is None:
            pieces.append(self._start_call(call, call.reader.name, call.num_held - 1))
        assert call.index is not None
        call.num_held = 0
        return [*pieces, ToolCallArguments(call.index, piece, 1)]

    def _start_call(self, call: _OpenCall, name: str, num_tokens: int) -> ToolCallStarted:
        call.index = self._next_index
        self._next_index += 1
        return ToolCallStarted(call.index, name, num_tokens)

    def _end_call(self, call: _OpenCall, *, is_closed: bool) -> list[Piece]:
        self._call = None
        pieces: list[Piece] = []
        if tail := self._detokenizer.flush():
            call.reader.push(tail)
        rest = call.reader.finish()
        if isinstance(rest, CallError):
            self.notes.append(f"a tool call was passed on as text: {rest.reason}")
            text = TOOL_CALL_START + call.reader.text + (TOOL_CALL_END if is_closed else "")
            return [Delta(Phase.ANSWER, self._visible(text), call.num_held)]
        self.num_tool_calls += 1
        if call.index is None:
            assert call.reader.name is not None
            pieces.append(self._start_call(call, call.reader.name, call.num_held))
            call.num_held = 0
        assert call.index is not None
        return [*pieces, ToolCallArguments(call.index, rest, call.num_held)]

    def _matched(self, text: str, number: int) -> str:
        """`text`, which came with token `number` of the output, as far as no stop text may begin in it."""
        if self._is_blank:
            # Newlines before the answer are in no text, so that a stop text of newlines does not end it there.
            text = text.lstrip("\n")
            self._is_blank = not text
        return self._matcher.push(text) if number > self._rules.min_tokens else self._matcher.pass_by(text)

    def _rest_of_text(self) -> str:
        """What waited for a character or a stop text to be complete. A stop text does not span a tool call."""
        return self._visible(self._matcher.pass_by(self._detokenizer.flush()) + self._matcher.flush())

    def _visible(self, text: str) -> str:
        shown = self._trimmer.push(text)
        self._is_blank = self._is_blank and self._trimmer.is_empty
        return shown


@dataclass
class _OpenCall:
    """A call that is being written."""

    reader: ToolCallReader
    index: int | None = None
    """Present once it was told."""
    num_held: int = 1
    """Its tokens that are in no piece yet, from the opening tag on."""
