"""What a call has in the end: `Result`, with one `Choice` for each generation."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from mull.client.events import Logprobs, Usage, enum_word, to_logprobs, to_usage
from mull.client.options import Message
from mull.v1 import generation_pb2 as pb

_FINISH = pb.Finished.Reason.DESCRIPTOR
_THINKING_ENDED = pb.ThinkingEnded.Reason.DESCRIPTOR
_PHASE = pb.Phase.DESCRIPTOR


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wants made."""

    id: str
    name: str
    arguments_json: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments, parsed."""
        parsed: dict[str, Any] = json.loads(self.arguments_json)
        return parsed


@dataclass(frozen=True, slots=True)
class Choice:
    """One generation."""

    index: int
    seed: int
    thinking: str
    answer: str
    tool_calls: tuple[ToolCall, ...]
    thinking_ended: str | None
    """Why the thoughts ended; None where there were none."""
    finish_reason: str
    stop: str
    """The stop text that came; empty where none did."""
    phase: str
    """Where it was when it finished: "thinking" or "answer"."""
    usage: Usage
    notes: tuple[str, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]

    @property
    def message(self) -> Message:
        """The turn to put into the history, without its thoughts."""
        calls = [
            pb.ToolCall(id=call.id, name=call.name, arguments_json=call.arguments_json) for call in self.tool_calls
        ]
        return Message("assistant", self.answer, tool_calls=tuple(calls))


class ReadsFirstChoice(ABC):
    """The parts of the first choice, by their names."""

    @abstractmethod
    def _result(self) -> Result:
        """All that came."""

    @property
    def answer(self) -> str:
        return self._result().choices[0].answer

    @property
    def thinking(self) -> str:
        return self._result().choices[0].thinking

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        return self._result().choices[0].tool_calls

    @property
    def finish_reason(self) -> str:
        return self._result().choices[0].finish_reason

    @property
    def usage(self) -> Usage:
        return self._result().choices[0].usage

    @property
    def message(self) -> Message:
        return self._result().choices[0].message


@dataclass(frozen=True)
class Result(ReadsFirstChoice):
    """A request's generations, finished."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]

    def _result(self) -> Result:
        return self


def to_result(response: pb.CompleteResponse) -> Result:
    """A response as dataclasses."""
    return Result(response.request_id, response.model, tuple(map(_choice, response.completions)))


def _choice(completion: pb.Completion) -> Choice:
    finished = completion.finished
    return Choice(
        index=completion.choice,
        seed=completion.seed,
        thinking=completion.thinking,
        answer=completion.answer,
        tool_calls=tuple(ToolCall(call.id, call.name, call.arguments_json) for call in completion.tool_calls),
        thinking_ended=enum_word(_THINKING_ENDED, completion.thinking_ended) if completion.thinking_ended else None,
        finish_reason=enum_word(_FINISH, finished.reason),
        stop=finished.stop,
        phase=enum_word(_PHASE, finished.phase),
        usage=to_usage(finished.usage),
        notes=tuple(finished.notes),
        token_ids=tuple(completion.token_ids),
        logprobs=tuple(map(to_logprobs, completion.logprobs)),
    )
