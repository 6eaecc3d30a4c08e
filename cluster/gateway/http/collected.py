"""The events of a request, put together per choice: for answers in one piece, and for the last words of streams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mull.v1 import generation_pb2 as pb

THOUGHTS_END = "\n</think>\n\n"
"""What stands between thoughts and answer in raw text, where Qwen's models write it."""

TokenLogprobs = tuple[int, pb.Logprobs]


@dataclass
class CollectedCall:
    """One tool call."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class CollectedChoice:
    """One generation."""

    index: int
    started: pb.Started = field(default_factory=pb.Started)
    thinking: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    tool_calls: list[CollectedCall] = field(default_factory=list)
    thinking_logprobs: list[TokenLogprobs] = field(default_factory=list)
    answer_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finished: pb.Finished | None = None

    @property
    def thinking_text(self) -> str:
        """All thoughts."""
        return "".join(self.thinking)

    @property
    def answer_text(self) -> str:
        """The whole answer, without tool calls."""
        return "".join(self.answer)

    def accept(self, event: pb.GenerateEvent) -> None:
        """Take the next event of this choice."""
        match event.WhichOneof("event"):
            case "started":
                self.started = event.started
            case "thinking_delta":
                self.thinking.append(event.thinking_delta.text)
                self.thinking_logprobs += token_logprobs(event.thinking_delta)
            case "answer_delta":
                self.answer.append(event.answer_delta.text)
                self.answer_logprobs += token_logprobs(event.answer_delta)
            case "tool_call_start":
                self.tool_calls.append(CollectedCall(event.tool_call_start.id, event.tool_call_start.name))
            case "tool_call_arguments_delta":
                delta = event.tool_call_arguments_delta
                self.tool_calls[delta.index].arguments += delta.arguments_json
            case "finished":
                self.finished = event.finished


def token_logprobs(delta: pb.ThinkingDelta | pb.AnswerDelta) -> list[TokenLogprobs]:
    """Each token id of a delta with its logprobs; empty where none were asked for."""
    return list(zip(delta.token_ids, delta.logprobs, strict=True)) if delta.logprobs else []


class Collector:
    """All choices of one request."""

    def __init__(self) -> None:
        self._choices: dict[int, CollectedChoice] = {}

    def accept(self, events: Iterable[pb.GenerateEvent]) -> None:
        """Take the next events."""
        for event in events:
            self.choice(event.choice).accept(event)

    def choice(self, index: int) -> CollectedChoice:
        """The choice of this index, new where nothing came for it yet."""
        if index not in self._choices:
            self._choices[index] = CollectedChoice(index)
        return self._choices[index]

    @property
    def choices(self) -> list[CollectedChoice]:
        """In the order of their indices."""
        return [self._choices[index] for index in sorted(self._choices)]

    @property
    def usage(self) -> pb.Usage:
        """Over all choices; their common prompt counts once."""
        return total_usage([choice.finished.usage for choice in self.choices if choice.finished is not None])


def total_usage(usages: Sequence[pb.Usage]) -> pb.Usage:
    """The sum, with the prompt, which is the same for all, counted once."""
    return pb.Usage(
        prompt_tokens=max((usage.prompt_tokens for usage in usages), default=0),
        cached_tokens=max((usage.cached_tokens for usage in usages), default=0),
        thinking_tokens=sum(usage.thinking_tokens for usage in usages),
        answer_tokens=sum(usage.answer_tokens for usage in usages),
    )


def as_raw_text(events: Iterable[pb.GenerateEvent]) -> list[pb.GenerateEvent]:
    """The same events with the thoughts and their closing tag in the answer's text, as the model writes them."""
    return [_raw(event) for event in events]


def _raw(event: pb.GenerateEvent) -> pb.GenerateEvent:
    match event.WhichOneof("event"):
        case "thinking_delta":
            thoughts = event.thinking_delta
            delta = pb.AnswerDelta(text=thoughts.text, token_ids=thoughts.token_ids, logprobs=thoughts.logprobs)
        case "thinking_ended" if event.thinking_ended.token_ids:
            ended = event.thinking_ended
            delta = pb.AnswerDelta(text=THOUGHTS_END, token_ids=ended.token_ids, logprobs=ended.logprobs)
        case _:
            return event
    return pb.GenerateEvent(sequence=event.sequence, choice=event.choice, answer_delta=delta)
