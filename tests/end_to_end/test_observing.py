"""What an operator sees of one server after one request: its log lines, its spans and `mull top`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceStub
from tests.end_to_end.servers import Server, mull, serving, told, wait_until
from tests.otlp import Collector

pytestmark = pytest.mark.timeout(300)

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
QUESTION = "What is 347 + 285?"


@dataclass
class Watched:
    """A server that has answered."""

    server: Server
    collector: Collector

    def lines(self) -> list[dict[str, Any]]:
        """All that it has written, but for the ready line."""
        return [json.loads(line) for line in list(self.server.lines) if not line.startswith(("ready", "\x1b"))]


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with (
        Collector() as collector,
        serving("--tp", "2", "--log-format", "json", "--otlp-endpoint", collector.endpoint) as server,
    ):
        with grpc.insecure_channel(server.address) as channel:
            ask(GenerationServiceStub(channel))
        yield Watched(server, collector)


def ask(stub: GenerationServiceStub) -> None:
    conversation = pb.Conversation(messages=[pb.Message(role="user", content=QUESTION)])
    request = pb.GenerateRequest(
        conversation=conversation, request_id="watched", max_tokens=300, sampling=pb.SamplingOptions(temperature=0)
    )
    call = stub.Generate(request, metadata=(("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01"),))
    assert "632" in "".join(event.answer_delta.text for event in call)


def test_every_process_writes_json_and_each_request_a_line(watched: Watched) -> None:
    def ended() -> list[dict[str, Any]]:
        return [line for line in watched.lines() if line["message"] == "request ended"]

    def have_written() -> set[str]:
        return {line["process"] for line in watched.lines()}

    wait_until(ended, "the line of the request")
    (line,) = ended()

    # Each has a file of its own, and they are read one after another.
    wait_until(lambda: have_written() >= {"gateway", "router", "rank-0", "rank-1"}, "a line of each process")
    assert (line["request_id"], line["status"], line["finish"]) == ("watched", "OK", "stop")
    assert line["trace_id"] == TRACE_ID
    assert 0 < line["time_to_first_token_s"] < line["time_to_first_answer_s"] < line["total_s"]
    assert line["thinking_tokens"] > line["answer_tokens"] > 0
    assert QUESTION not in "".join(watched.server.lines)


def test_a_request_is_one_trace_from_its_client_to_the_router(watched: Watched) -> None:
    spans = watched.collector.wait_for("generate", "sequence", "queue", "prefill", "thinking", "answer")

    assert {span.trace_id for span in spans.values()} == {TRACE_ID}
    assert spans["generate"].parent_id == SPAN_ID
    assert spans["sequence"].parent_id == spans["generate"].span_id
    assert spans["sequence"].events == ["first token"]


def test_top_shows_what_the_server_did(watched: Watched) -> None:
    shown = told("top", "--once", "--interval-s", "0.2", watched.server.metrics_url, watched.server.router_metrics_url)

    assert "1 of 1 gateways · 1 Routers" in shown
    assert "ready" in shown
    assert "natural 1" in shown
    assert "2/2" in shown


def test_top_without_a_server_says_so_in_one_line() -> None:
    done = mull("top", "127.0.0.1:1", "--once")

    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr
    assert len(done.stderr.splitlines()) == 1
