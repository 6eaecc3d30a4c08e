"""`mull chat`: a conversation in the terminal, or one question as an argument.

A client like any other: it needs the stubs and grpcio, and reaches the gateway over its public protocol.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message
from rich.console import Console
from rich.text import Text

from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceStub


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What every question of a conversation is asked with."""

    sampling: pb.SamplingOptions
    max_tokens: int | None = None
    model: str = ""
    system: str | None = None


class Printer(Protocol):
    """Shows the events of one generation as they come."""

    def show(self, event: pb.GenerateEvent) -> None: ...


class JsonPrinter:
    """One event a line: its name, sequence number and fields; enum values in lower case, without their prefix."""

    def show(self, event: pb.GenerateEvent) -> None:
        name = event.WhichOneof("event")
        assert name is not None
        line = {"event": name, "sequence": event.sequence, **_plain(getattr(event, name))}
        print(json.dumps(line, ensure_ascii=False), flush=True)


def _plain(message: Message) -> dict[str, Any]:
    return {field.name: _plain_field(message, field) for field in message.DESCRIPTOR.fields}


def _plain_field(message: Message, descriptor: Any) -> Any:
    value = getattr(message, descriptor.name)
    values = list(value) if descriptor.is_repeated else [value]
    if descriptor.message_type is not None:
        values = [_plain(v) for v in values]
    elif descriptor.enum_type is not None:
        prefix = descriptor.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        values = [descriptor.enum_type.values_by_number[v].name.removeprefix(prefix).lower() for v in values]
    return values if descriptor.is_repeated else values[0]


@dataclass
class TerminalPrinter:
    """Thoughts dimmed, then the answer, then one line of usage and timings."""

    console: Console
    asked_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    first_answer_s: float | None = None

    def show(self, event: pb.GenerateEvent) -> None:
        match event.WhichOneof("event"):
            case "thinking_delta":
                self.first_token_s = self.first_token_s or time.monotonic()
                self._write(event.thinking_delta.text, "dim")
            case "thinking_ended":
                self._write("\n\n", "")
            case "answer_delta":
                self.first_token_s = self.first_token_s or time.monotonic()
                self.first_answer_s = self.first_answer_s or time.monotonic()
                self._write(event.answer_delta.text, "bold")
            case "finished":
                self._write("\n", "")
                self._write(self._summary(event.finished) + "\n", "cyan")

    def _write(self, text: str, style: str) -> None:
        # A model's text must not steer the terminal.
        self.console.print(Text(text.replace("\x1b", "␛"), style=style), end="", soft_wrap=True)

    def _summary(self, finished: pb.Finished) -> str:
        usage, end_s = finished.usage, time.monotonic()
        generated = usage.thinking_tokens + usage.answer_tokens
        first_s = self.first_token_s or end_s
        parts = [
            f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached)",
            f"{usage.thinking_tokens} thinking + {usage.answer_tokens} answer tokens",
            f"first token {first_s - self.asked_s:.2f} s",
        ]
        if self.first_answer_s is not None:
            parts.append(f"first answer {self.first_answer_s - self.asked_s:.2f} s")
        if generated > 1 and end_s > first_s:
            parts.append(f"{(generated - 1) / (end_s - first_s):.0f} tokens/s")
        if finished.reason == pb.Finished.REASON_LENGTH:
            where = "thinking" if finished.phase == pb.PHASE_THINKING else "answering"
            parts.append(f"cut while {where}: the token limit was reached")
        return " · ".join(parts)


@dataclass
class Conversation:
    """The turns so far. Thoughts are not kept: a Qwen3 thinking model must not see those of earlier turns."""

    stub: GenerationServiceStub
    options: ChatOptions
    messages: list[pb.Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.options.system is not None:
            self.messages.append(pb.Message(role="system", content=self.options.system))

    def ask(self, question: str, printer: Printer) -> str:
        """Ask, show the events, remember the turn; a failed turn is forgotten. Returns the answer. Raises RpcError."""
        turn = pb.Message(role="user", content=question)
        answer = ""
        for event in self._events([*self.messages, turn]):
            printer.show(event)
            answer += event.answer_delta.text
        self.messages += [turn, pb.Message(role="assistant", content=answer)]
        return answer

    def _events(self, messages: list[pb.Message]) -> Iterator[pb.GenerateEvent]:
        request = pb.GenerateRequest(
            model=self.options.model,
            conversation=pb.Conversation(messages=messages),
            sampling=self.options.sampling,
            max_tokens=self.options.max_tokens,
        )
        call = self.stub.Generate(request)
        try:
            yield from call
        finally:
            # An interrupted turn must not go on in the server.
            call.cancel()  # type: ignore[no-untyped-call]  # grpc's stubs leave it untyped


def chat(address: str, question: str | None, options: ChatOptions, *, as_json: bool) -> int:
    """Ask one question, or converse until end of input. Returns the exit code."""
    console = Console(highlight=False)
    with grpc.insecure_channel(address) as channel:
        conversation = Conversation(GenerationServiceStub(channel), options)

        def new_printer() -> Printer:
            return JsonPrinter() if as_json else TerminalPrinter(console)

        if question is not None:
            conversation.ask(question, new_printer())
            return 0
        return _converse(conversation, new_printer)


def _converse(conversation: Conversation, new_printer: Callable[[], Printer]) -> int:
    """A script must learn that a turn has failed; a person has seen it."""
    if sys.stdin.isatty():
        print("Ask something. Ctrl-C stops an answer, Ctrl-D ends the conversation.", file=sys.stderr)
    num_failed = 0
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return 1 if num_failed and not sys.stdin.isatty() else 0
        if not question:
            continue
        try:
            conversation.ask(question, new_printer())
        except KeyboardInterrupt:
            print("\nstopped; this turn is forgotten", file=sys.stderr)
        except grpc.RpcError as error:
            num_failed += 1
            print(describe_rpc_error(error), file=sys.stderr)


def describe_rpc_error(error: grpc.RpcError) -> str:
    """One line: the status code and what the server said, or that nobody answers."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        return (
            f"mull: no server answers ({details.splitlines()[-1]}); start one with 'mull serve', or give its --address"
        )
    return f"mull: {code.name}: {details}"
