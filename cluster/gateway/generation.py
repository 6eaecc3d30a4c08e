"""One generation: deliveries of tokens in, the events that a client sees out.

Hop 11, and a pure state machine: no clock, socket or await. Started is the first event and Finished the last; the token
ids of all events together are the tokens of the model, each once and in order. Knows nothing of mailboxes' bounds,
the Router or gRPC calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.gateway.mailbox import Delivery
from cluster.gateway.requests import PreparedRequest
from cluster.gateway.served_model import ServedModel
from cluster.text.phases import Delta, Phase, PhaseSplitter, Piece
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2

_PHASES = {Phase.THINKING: pb.PHASE_THINKING, Phase.ANSWER: pb.PHASE_ANSWER}
_FINISH_REASONS = {
    router_pb2.End.REASON_STOP: pb.Finished.REASON_STOP,
    router_pb2.End.REASON_LENGTH: pb.Finished.REASON_LENGTH,
}
_THOUGHTS_CUT_BY = {
    router_pb2.End.REASON_STOP: pb.ThinkingEnded.REASON_STOP,
    router_pb2.End.REASON_LENGTH: pb.ThinkingEnded.REASON_LENGTH,
}


class Generation:
    """The events of one request."""

    def __init__(self, request: PreparedRequest, model: ServedModel) -> None:
        self.num_thinking_tokens = 0
        self.num_answer_tokens = 0
        self.cached_tokens = 0
        self.finished: pb.Finished | None = None
        self.thinking_ended: pb.ThinkingEnded | None = None
        self._request = request
        self._model = model
        self._token_bytes = model.tokenizer.token_bytes
        self._splitter = PhaseSplitter(
            model.tags, model.tokenizer.detokenizer(), starts_thinking=request.starts_thinking
        )
        self._num_events = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._request.prompt_ids)

    @property
    def phase(self) -> Phase:
        """Where the generation is."""
        return self._splitter.phase

    def accept(self, delivery: Delivery) -> list[pb.GenerateEvent]:
        """The events of these tokens."""
        events = [] if self._num_events else [self._started(delivery)]
        token_ids = delivery.token_ids
        num_text_tokens = len(token_ids)
        if delivery.finish == router_pb2.End.REASON_STOP and token_ids:
            num_text_tokens -= 1
        pieces = self._splitter.push(token_ids[:num_text_tokens])
        events += [self._piece_event(piece, delivery) for piece in pieces]
        if delivery.finish is not None:
            events += self._finish(delivery, delivery.finish, num_text_tokens)
        return events

    def _started(self, delivery: Delivery) -> pb.GenerateEvent:
        self.cached_tokens = delivery.cached_tokens or 0
        started = pb.Started(
            request_id=self._request.request_id,
            model=self._model.name,
            seed=self._request.sampling.seed,
            prompt_tokens=self.num_prompt_tokens,
            cached_tokens=self.cached_tokens,
        )
        return pb.GenerateEvent(sequence=self._next_sequence(), started=started)

    def _piece_event(self, piece: Piece, delivery: Delivery) -> pb.GenerateEvent:
        if isinstance(piece, Delta):
            ids = delivery.token_ids[piece.start : piece.stop]
            self._count(piece.phase, len(ids))
            return self._delta_event(piece.phase, piece.text, ids, self._logprobs(delivery, piece.start, piece.stop))
        self._count(Phase.THINKING, 1)
        return self._thinking_ended(
            pb.ThinkingEnded(
                reason=pb.ThinkingEnded.REASON_NATURAL,
                token_ids=[delivery.token_ids[piece.index]],
                logprobs=self._logprobs(delivery, piece.index, piece.index + 1),
            )
        )

    def _finish(
        self, delivery: Delivery, reason: router_pb2.End.Reason, num_text_tokens: int
    ) -> list[pb.GenerateEvent]:
        events = []
        phase = self.phase
        stop_ids = delivery.token_ids[num_text_tokens:]
        self._count(phase, len(stop_ids))
        if tail := self._splitter.finish():
            events.append(self._delta_event(phase, tail, [], []))
        if phase is Phase.THINKING:
            events.append(self._thinking_ended(pb.ThinkingEnded(reason=_THOUGHTS_CUT_BY[reason])))
        self.finished = pb.Finished(
            reason=_FINISH_REASONS[reason],
            phase=_PHASES[phase],
            usage=self._usage(),
            token_ids=stop_ids,
            logprobs=self._logprobs(delivery, num_text_tokens, len(delivery.token_ids)),
        )
        events.append(pb.GenerateEvent(sequence=self._next_sequence(), finished=self.finished))
        return events

    def _delta_event(
        self, phase: Phase, text: str, token_ids: Sequence[int], logprobs: list[pb.Logprobs]
    ) -> pb.GenerateEvent:
        sequence = self._next_sequence()
        if phase is Phase.THINKING:
            thoughts = pb.ThinkingDelta(text=text, token_ids=token_ids, logprobs=logprobs)
            return pb.GenerateEvent(sequence=sequence, thinking_delta=thoughts)
        answer = pb.AnswerDelta(text=text, token_ids=token_ids, logprobs=logprobs)
        return pb.GenerateEvent(sequence=sequence, answer_delta=answer)

    def _thinking_ended(self, ended: pb.ThinkingEnded) -> pb.GenerateEvent:
        self.thinking_ended = ended
        return pb.GenerateEvent(sequence=self._next_sequence(), thinking_ended=ended)

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

    def _logprobs(self, delivery: Delivery, start: int, stop: int) -> list[pb.Logprobs]:
        return [self._logprobs_message(entry) for entry in delivery.logprobs[start:stop]]

    def _logprobs_message(self, entry: router_pb2.RouterLogprobs) -> pb.Logprobs:
        top = [
            pb.TopLogprob(
                token_id=token_id, text=self._token_bytes[token_id].decode("utf-8", "replace"), logprob=logprob
            )
            for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        ]
        return pb.Logprobs(logprob=entry.logprob, top=top)

    def _next_sequence(self) -> int:
        sequence = self._num_events
        self._num_events += 1
        return sequence
