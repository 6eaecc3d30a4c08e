"""What `mull chat` prints of a stream of events."""

from __future__ import annotations

import io
import json

import grpc
import pytest
from rich.console import Console

from cluster.chat import JsonPrinter, TerminalPrinter, describe_failure
from mull.client import CallFailed
from mull.client.events import Event, to_event
from mull.v1 import generation_pb2 as pb

USAGE = pb.Usage(prompt_tokens=9, cached_tokens=4, thinking_tokens=3, answer_tokens=2)

MESSAGES = [
    pb.GenerateEvent(sequence=0, started=pb.Started(request_id="r", model="m", seed=7, prompt_tokens=9)),
    pb.GenerateEvent(sequence=1, thinking_delta=pb.ThinkingDelta(text="hm [b]", token_ids=[5, 6])),
    pb.GenerateEvent(sequence=2, thinking_ended=pb.ThinkingEnded(reason=pb.ThinkingEnded.REASON_NATURAL)),
    pb.GenerateEvent(sequence=3, answer_delta=pb.AnswerDelta(text="42", token_ids=[8])),
    pb.GenerateEvent(
        sequence=4, finished=pb.Finished(reason=pb.Finished.REASON_STOP, phase=pb.PHASE_ANSWER, usage=USAGE)
    ),
]


EVENTS = [event for message in MESSAGES if (event := to_event(message)) is not None]


def test_json_has_one_event_a_line_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    for event in EVENTS:
        JsonPrinter().show(event)

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = {"event": "thinking_delta", "sequence": 1, "choice": 0, "text": "hm [b]", "token_ids": [5, 6]}
    assert lines[1] == {**expected, "logprobs": []}
    assert lines[2]["reason"] == "natural"
    assert (lines[4]["reason"], lines[4]["phase"]) == ("stop", "answer")
    assert lines[4]["usage"]["thinking_tokens"] == 3


def printed(events: list[Event], *, is_terminal: bool) -> str:
    out = io.StringIO()
    colours = "standard" if is_terminal else None
    printer = TerminalPrinter(Console(file=out, force_terminal=is_terminal, color_system=colours, highlight=False))
    for event in events:
        printer.show(event)
    return out.getvalue()


def test_a_terminal_shows_thoughts_dimmed_and_text_as_it_is() -> None:
    text = printed(EVENTS, is_terminal=True)

    assert "\x1b[2mhm [b]\x1b[0m" in text
    assert text.index("hm [b]") < text.index("42")


def test_a_pipe_gets_no_control_codes_and_a_line_of_usage() -> None:
    text = printed(EVENTS, is_terminal=False)

    assert "\x1b" not in text
    assert "9 prompt tokens (4 cached) · 3 thinking + 2 answer tokens" in text.splitlines()[-1]


def test_an_output_cut_in_its_thoughts_says_so() -> None:
    cut = pb.Finished(reason=pb.Finished.REASON_LENGTH, phase=pb.PHASE_THINKING, usage=USAGE)

    last = to_event(pb.GenerateEvent(sequence=2, finished=cut))
    assert last is not None
    text = printed([*EVENTS[:2], last], is_terminal=False)

    assert "cut while thinking" in text.splitlines()[-1]


def test_a_server_that_refuses_is_told_from_none_that_answers() -> None:
    unavailable, message = grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses"

    nobody = describe_failure(CallFailed(unavailable, message))
    refused = describe_failure(CallFailed(unavailable, f"the Router is out of reach ({message})", request_id="r"))

    assert nobody.startswith("mull: no server answers")
    assert refused == f"mull: UNAVAILABLE: the Router is out of reach ({message})"
