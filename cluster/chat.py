"""`mull chat`: a conversation in the terminal, or one question as an argument.

A client like any other: it stands on mull.client, and reaches the gateway over its public protocol.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import grpc
from rich.console import Console
from rich.text import Text

from cluster.server_address import ServerAddress
from mull.client import CallFailed, Client, Message, Options, RetryPolicy
from mull.client.events import EVENT_NAMES, AnswerDelta, Event, Finished, ThinkingDelta, ThinkingEnded, ToolCallStart


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What every question of a conversation is asked with."""

    options: Options
    system: str | None = None


class Printer(Protocol):
    """Shows the events of one generation as they come."""

    def show(self, event: Event) -> None: ...


class JsonPrinter:
    """One event a line: its name, sequence number and fields; enum values in lower case, without their prefix."""

    def show(self, event: Event) -> None:
        line: dict[str, Any] = {"event": EVENT_NAMES[type(event)], **asdict(event)}
        print(json.dumps(line, ensure_ascii=False), flush=True)


@dataclass
class TerminalPrinter:
    """Thoughts dimmed, then the answer, then one line of usage and timings."""

    console: Console
    asked_s: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    first_answer_s: float | None = None

    def show(self, event: Event) -> None:
        match event:
            case ThinkingDelta():
                self.first_token_s = self.first_token_s or time.monotonic()
                self._write(event.text, "dim")
            case ThinkingEnded():
                self._write("\n\n", "")
            case AnswerDelta():
                self.first_token_s = self.first_token_s or time.monotonic()
                self.first_answer_s = self.first_answer_s or time.monotonic()
                self._write(event.text, "bold")
            case ToolCallStart():
                self._write(f"\n[calls {event.name}]\n", "yellow")
            case Finished():
                self._write("\n", "")
                self._write(self._summary(event) + "\n", "cyan")

    def _write(self, text: str, style: str) -> None:
        # A model's text must not steer the terminal.
        self.console.print(Text(text.replace("\x1b", "␛"), style=style), end="", soft_wrap=True)

    def _summary(self, finished: Finished) -> str:
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
        if finished.reason == "length":
            where = "thinking" if finished.phase == "thinking" else "answering"
            parts.append(f"cut while {where}: the token limit was reached")
        return " · ".join(parts)


@dataclass
class Conversation:
    """The turns so far. Thoughts are not kept: a Qwen3 thinking model must not see those of earlier turns."""

    client: Client
    options: ChatOptions
    messages: list[Message] = field(default_factory=list)

    def ask(self, question: str, printer: Printer) -> str:
        """Ask, show the events, remember the turn; a failed one is forgotten. Returns the answer. Raises CallFailed."""
        turn = Message("user", question)
        # An interrupted turn must not go on in the server.
        with self.client.chat([*self.messages, turn], system=self.options.system, **self.options.options) as reply:
            for event in reply:
                printer.show(event)
            self.messages += [turn, reply.message]
            return reply.answer


def chat(server: ServerAddress, question: str | None, options: ChatOptions, *, as_json: bool) -> int:
    """Ask one question, or converse until end of input. Returns the exit code."""
    console = Console(highlight=False)
    # Who sits before it tries again by themselves.
    with server.client(retry=RetryPolicy(attempts=1)) as client:
        conversation = Conversation(client, options)

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
        except CallFailed as error:
            num_failed += 1
            print(describe_failure(error), file=sys.stderr)


def describe_failure(error: CallFailed) -> str:
    """One line: the status code and what the server said, or that nobody answers."""
    # A server names the request in whatever it refuses.
    is_ours = error.request_id is not None
    if error.code is grpc.StatusCode.UNAVAILABLE and not is_ours and "connect" in error.message.lower():
        last = error.message.splitlines()[-1]
        return f"mull: no server answers ({last}); start one with 'mull serve', or give its --address"
    return f"mull: {error}"
