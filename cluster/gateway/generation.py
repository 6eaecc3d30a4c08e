"""One generation: deliveries of tokens in, the events that a client sees out.

Hop 11, and a pure state machine: no clock, socket or await. Started is the first event and Finished the last; the token
ids of all events together are the tokens of the model, each once and in order. Knows nothing of mailboxes' bounds,
the Router or gRPC calls.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from cluster.gateway.mailbox import Delivery
from cluster.gateway.requests import PreparedRequest
from cluster.gateway.served_model import ServedModel
from cluster.text.phases import PhaseSplitter
from cluster.text.pieces import Delta, Phase, Piece, ThoughtsClosed, ToolCallArguments, ToolCallStarted
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2

_PHASES = {Phase.THINKING: pb.PHASE_THINKING, Phase.ANSWER: pb.PHASE_ANSWER}
_THOUGHTS_CUT_BY = {
    router_pb2.End.REASON_STOP: pb.ThinkingEnded.REASON_STOP,
    router_pb2.End.REASON_LENGTH: pb.ThinkingEnded.REASON_LENGTH,
}


class _Tokens(NamedTuple):
    """Tokens of one event, and their logprobs where asked for."""

    ids: list[int]
    logprobs: list[pb.Logprobs]


class Generation:
    """The events of one of a request's generations."""

    def __init__(self, request: PreparedRequest, model: ServedModel, choice: int = 0) -> None:
        self.num_thinking_tokens = 0
        self.num_answer_tokens = 0
        self.cached_tokens = 0
        self.finished: pb.Finished | None = None
        self.thinking_ended: pb.ThinkingEnded | None = None
        self._request = request
        self._model = model
        self._choice = choice
        self._token_bytes = model.tokenizer.token_bytes
        self._splitter = PhaseSplitter(
            model.tags,
            model.tokenizer.detokenizer(),
            starts_thinking=request.starts_thinking,
            rules=request.rules,
        )
        self._num_events = 0
        # Tokens that are in no event yet; events take them from the front.
        self._unsent_ids: list[int] = []
        self._unsent_logprobs: list[router_pb2.RouterLogprobs] = []

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._request.prompt_ids)

    @property
    def num_unsent_tokens(self) -> int:
        """Tokens that are in no event yet."""
        return len(self._unsent_ids)

    @property
    def phase(self) -> Phase:
        """Where the generation is."""
        return self._splitter.phase

    def accept(self, delivery: Delivery) -> list[pb.GenerateEvent]:
        """The events of these tokens. Once it has `finished` on its own, the Router's sequence is to be cancelled."""
        if delivery.cached_tokens is not None:
            self.cached_tokens = delivery.cached_tokens
        events = [] if self._num_events else [self._started(delivery)]
        text_ids, stop_ids = delivery.token_ids, []
        if delivery.finish == router_pb2.End.REASON_STOP and text_ids:
            text_ids, stop_ids = text_ids[:-1], text_ids[-1:]
        self._unsent_ids += delivery.token_ids
        self._unsent_logprobs += delivery.logprobs
        events += [self._piece_event(piece, delivery) for piece in self._splitter.push(text_ids)]
        if self._splitter.answer.is_over:
            events += self._finish_early()
        elif delivery.finish is not None:
            events += self._finish(delivery.finish, stop_ids)
        return events

    def _started(self, delivery: Delivery) -> pb.GenerateEvent:
        event = self._next_event()
        started = event.started
        started.request_id = self._request.request_id
        started.model = self._model.name
        started.seed = self._request.seed_of(self._choice)
        started.prompt_tokens = self.num_prompt_tokens
        started.cached_tokens = self.cached_tokens
        started.prompt_logprobs.extend(self._logprobs_message(entry) for entry in delivery.prompt_logprobs)
        return event

    def _piece_event(self, piece: Piece, delivery: Delivery) -> pb.GenerateEvent:
        ids, logprobs = self._take(piece.num_tokens)
        if isinstance(piece, Delta):
            self._count(piece.phase, piece.num_tokens)
            return self._delta_event(piece.phase, piece.text, ids, logprobs)
        position = self.num_thinking_tokens + self.num_answer_tokens
        self._count(Phase.THINKING if isinstance(piece, ThoughtsClosed) else Phase.ANSWER, piece.num_tokens)
        match piece:
            case ThoughtsClosed():
                by_budget = position in delivery.forced
                reason = pb.ThinkingEnded.REASON_BUDGET if by_budget else pb.ThinkingEnded.REASON_NATURAL
                return self._thinking_ended(pb.ThinkingEnded(reason=reason, token_ids=ids, logprobs=logprobs))
            case ToolCallStarted(index, name):
                event = self._next_event()
                call_id = self._call_id(index)
                start = pb.ToolCallStart(index=index, id=call_id, name=name, token_ids=ids, logprobs=logprobs)
                event.tool_call_start.CopyFrom(start)
                return event
            case ToolCallArguments(index, text):
                event = self._next_event()
                more = pb.ToolCallArgumentsDelta(index=index, arguments_json=text, token_ids=ids, logprobs=logprobs)
                event.tool_call_arguments_delta.CopyFrom(more)
                return event

    def _call_id(self, index: int) -> str:
        """Unique, and the same wherever the generation goes on: a client may know it already."""
        prompt = array("I", self._request.prompt_ids).tobytes()
        name = f"{self._request.request_id}/{self._choice}/{index}/"
        return f"call_{hashlib.blake2b(name.encode() + prompt, digest_size=16).hexdigest()}"

    def _finish_early(self) -> list[pb.GenerateEvent]:
        """A stop text came, or as many tool calls as may."""
        self._unsent_ids, self._unsent_logprobs = [], []
        events = [self._delta_event(piece.phase, piece.text, [], []) for piece in self._text_left()]
        stop = self._splitter.answer.stop
        reason = pb.Finished.REASON_TOOL_CALLS if stop is None else pb.Finished.REASON_STOP_TEXT
        return [*events, self._finished(pb.Finished(reason=reason, stop=stop or ""))]

    def _text_left(self) -> list[Delta]:
        return [piece for piece in self._splitter.finish() if isinstance(piece, Delta)]

    def _finish(self, end: router_pb2.End.Reason, stop_ids: Sequence[int]) -> list[pb.GenerateEvent]:
        phase = self.phase
        events = [self._piece_event(piece, Delivery(None, [], [], None)) for piece in self._splitter.finish()]
        self._count(phase, len(stop_ids))
        if phase is Phase.THINKING:
            events.append(self._thinking_ended(pb.ThinkingEnded(reason=_THOUGHTS_CUT_BY[end])))
        ids, logprobs = self._take(len(stop_ids))
        finished = pb.Finished(reason=self._reason(end, stop_ids), token_ids=ids, logprobs=logprobs)
        if finished.reason == pb.Finished.REASON_STOP_TEXT:
            finished.stop = self._model.tokenizer.token_text(ids[-1])
        return [*events, self._finished(finished)]

    def _reason(self, end: router_pb2.End.Reason, stop_ids: Sequence[int]) -> pb.Finished.Reason:
        if end == router_pb2.End.REASON_LENGTH:
            return pb.Finished.REASON_LENGTH
        if stop_ids and stop_ids[-1] not in self._request.own_stop_ids:
            return pb.Finished.REASON_STOP_TEXT
        called = self._splitter.answer.num_tool_calls
        return pb.Finished.REASON_TOOL_CALLS if called else pb.Finished.REASON_STOP

    def _finished(self, finished: pb.Finished) -> pb.GenerateEvent:
        finished.phase = _PHASES[self.phase]
        finished.usage.CopyFrom(self._usage())
        finished.notes.extend(self._splitter.answer.notes)
        self.finished = finished
        event = self._next_event()
        event.finished.CopyFrom(finished)
        return event

    def _delta_event(
        self, phase: Phase, text: str, token_ids: Sequence[int], logprobs: list[pb.Logprobs]
    ) -> pb.GenerateEvent:
        event = self._next_event()
        delta = event.thinking_delta if phase is Phase.THINKING else event.answer_delta
        delta.SetInParent()
        delta.text = text
        delta.token_ids.extend(token_ids)
        delta.logprobs.extend(logprobs)
        return event

    def _thinking_ended(self, ended: pb.ThinkingEnded) -> pb.GenerateEvent:
        self.thinking_ended = ended
        event = self._next_event()
        event.thinking_ended.CopyFrom(ended)
        return event

    def _next_event(self) -> pb.GenerateEvent:
        """To be filled in place: there is one for nearly every token, and to copy its parts takes twice as long."""
        event = pb.GenerateEvent(sequence=self._num_events, choice=self._choice)
        self._num_events += 1
        return event

    def _usage(self) -> pb.Usage:
        return pb.Usage(
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=self.cached_tokens,
            thinking_tokens=self.num_thinking_tokens,
            answer_tokens=self.num_answer_tokens,
        )

    def _count(self, phase: Phase, num_tokens: int) -> None:
        if phase is Phase.THINKING:
            self.num_thinking_tokens += num_tokens
        else:
            self.num_answer_tokens += num_tokens

    def _take(self, num_tokens: int) -> _Tokens:
        """The next tokens that are in no event yet."""
        if num_tokens == len(self._unsent_ids) and not self._unsent_logprobs:
            ids, self._unsent_ids = self._unsent_ids, []
            return _Tokens(ids, [])
        ids, self._unsent_ids = self._unsent_ids[:num_tokens], self._unsent_ids[num_tokens:]
        entries, self._unsent_logprobs = self._unsent_logprobs[:num_tokens], self._unsent_logprobs[num_tokens:]
        return _Tokens(ids, [self._logprobs_message(entry) for entry in entries])

    def _logprobs_message(self, entry: router_pb2.RouterLogprobs) -> pb.Logprobs:
        top = [
            pb.TopLogprob(
                token_id=token_id, text=self._token_bytes[token_id].decode("utf-8", "replace"), logprob=logprob
            )
            for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        ]
        return pb.Logprobs(logprob=entry.logprob, top=top)
