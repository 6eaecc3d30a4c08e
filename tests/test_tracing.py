"""Requests as spans: a real gateway and a real Router over ranks without a model, and a collector that listens."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc.aio
import httpx
import pytest

from cluster.config import GatewayConfig, ModelSource
from cluster.gateway.copies import static_addresses
from cluster.gateway.served_model import ServedModel
from cluster.gateway.server import GatewayPorts, GatewayServer
from cluster.router.router import Router
from cluster.router.sequence import SequenceRequest, SequenceUpdate
from cluster.router.sequence_spans import SequenceSpans
from cluster.router.supervision import RestartPolicy
from cluster.router.wire import ModelInfo
from cluster.spans import Exporting, Tracing
from cluster.tracing import TraceParent
from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceStub
from tests.fakes import FakeRanks
from tests.gateway.conftest import FAST, POCKET, ask
from tests.otlp import Collector, SentSpan
from tests.router.fake_group import BLOCK_SIZE, FakeShardGroup
from tests.router.router_site import CONFIG, NUM_BLOCKS
from workers.logs import JsonLines
from workers.step import SamplingParams

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACED = (("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-01"),)
SECRET = "the launch code"


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return ServedModel.load(ModelSource(path=POCKET, name="pocket"))


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as listening:
        yield listening


class Site:
    """One gateway, one Router, and the groups of ranks that it has had."""

    def __init__(self, ports: GatewayPorts, stub: GenerationServiceStub, groups: list[FakeShardGroup]) -> None:
        self.ports = ports
        self.stub = stub
        self.groups = groups

    async def thought_and_answer(self, **metadata: object) -> pb.CompleteResponse:
        return await self.stub.Complete(ask(SECRET, max_tokens=60, thinking_budget=5, ignore_eos=True), **metadata)


@asynccontextmanager
async def site(
    model: ServedModel, endpoint: str, num_blocks: int = NUM_BLOCKS, send_timeout_s: float = 20.0
) -> AsyncIterator[Site]:
    exporting = Exporting(endpoint, delay_s=0.05, timeout_s=send_timeout_s)
    groups: list[FakeShardGroup] = []

    def make_group(on_progress: object, _survivors: object) -> FakeShardGroup:
        ranks = FakeRanks(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_num_seqs=CONFIG.max_num_seqs,
            max_num_batched_tokens=CONFIG.max_num_batched_tokens,
            vocab_size=model.vocab_size,
        )
        groups.append(FakeShardGroup([ranks], on_progress))
        return groups[-1]

    info = ModelInfo(name="pocket", vocab_size=model.vocab_size, max_model_len=400, think_end_id=model.tags.close_id)
    async with AsyncExitStack() as stack:
        tracing = Tracing(exporting, "router")
        stack.push_async_callback(asyncio.to_thread, tracing.close)
        policy = RestartPolicy(max_restarts=3, first_backoff_s=0.001)
        router = Router(info, CONFIG, make_group, restarts=policy, watches=[SequenceSpans(tracing)])
        await router.start()
        stack.push_async_callback(router.stop)
        config = GatewayConfig(grpc_port=0, http_port=0, metrics_port=0, max_streams=8)
        addresses, own = static_addresses(router.address), Tracing(exporting, "gateway")
        server = GatewayServer(config, model, addresses, link_times=FAST, tracing=own)
        ports = await server.start()
        stack.push_async_callback(server.drain, 0)
        while not server.copies.state.ready:
            await server.copies.updated()
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}"))
        yield Site(ports, GenerationServiceStub(channel), groups)


@pytest.fixture
async def traced(model: ServedModel, collector: Collector) -> AsyncIterator[Site]:
    async with site(model, collector.endpoint) as running:
        yield running


def lies_in(part: SentSpan, whole: SentSpan) -> bool:
    return (
        whole.proto.start_time_unix_nano
        <= part.proto.start_time_unix_nano
        <= part.proto.end_time_unix_nano
        <= whole.proto.end_time_unix_nano
    )


async def test_the_spans_of_a_request_nest_below_the_clients_own(
    traced: Site, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await traced.thought_and_answer(metadata=TRACED)
    spans = await asyncio.to_thread(
        collector.wait_for, "generate", "sequence", "queue", "prefill", "thinking", "answer"
    )

    generate, sequence = spans["generate"], spans["sequence"]
    assert {span.trace_id for span in spans.values()} == {TRACE_ID}
    assert (generate.parent_id, sequence.parent_id) == (SPAN_ID, generate.span_id)
    assert [spans[name].parent_id for name in ("thinking", "answer")] == [generate.span_id] * 2
    assert [spans[name].parent_id for name in ("queue", "prefill")] == [sequence.span_id] * 2
    assert (generate.service, sequence.service) == ("mull-gateway", "mull-router")
    assert all(lies_in(spans[name], generate) for name in ("thinking", "answer"))
    assert all(lies_in(spans[name], sequence) for name in ("queue", "prefill"))
    assert sequence.events == ["first token"]
    (line,) = [it for it in caplog.records if it.name == "cluster.gateway.request_log"]
    assert f'"trace_id": "{TRACE_ID}"' in JsonLines("gateway").format(line)


async def test_spans_count_tokens_and_have_no_text(traced: Site, collector: Collector) -> None:
    reply = await traced.thought_and_answer()
    spans = await asyncio.to_thread(collector.wait_for, "generate", "sequence")

    counted = spans["generate"].attributes
    usage = reply.completions[0].finished.usage
    assert (counted["mull.status"], counted["mull.finish"]) == ("OK", "length")
    assert counted["mull.thinking_tokens"] == usage.thinking_tokens
    assert counted["mull.answer_tokens"] == usage.answer_tokens
    assert spans["sequence"].attributes["mull.tokens"] == 60
    assert spans["generate"].parent_id == ""
    assert SECRET not in str([span.proto for span in collector.spans])


async def test_a_loss_of_ranks_is_told_in_the_span_of_whom_it_met(traced: Site, collector: Collector) -> None:
    traced.groups[0].release(num_steps=30)
    stream = traced.stub.Generate(ask(max_tokens=200, ignore_eos=True))
    for _ in range(2):
        await stream.read()
    traced.groups[0].lose_rank()
    while await stream.read() is not grpc.aio.EOF:
        pass
    spans = await asyncio.to_thread(collector.wait_for, "sequence")

    assert spans["sequence"].events == ["first token", "ranks lost", "first token behind the loss"]


async def test_a_preemption_is_told_in_the_span_of_whom_it_met(model: ServedModel, collector: Collector) -> None:
    # given: KV for one and a half of two requests
    async with site(model, collector.endpoint, num_blocks=400 // BLOCK_SIZE) as narrow:
        requests = [narrow.stub.Complete(ask(max_tokens=250, ignore_eos=True)) for _ in range(2)]
        await asyncio.gather(*requests)
    first, second = (span for span in collector.spans if span.name == "sequence")

    assert first.attributes["mull.preemptions"] == 0
    assert second.attributes["mull.preemptions"] > 0
    assert "computed again after a preemption" in second.events


async def test_a_trace_comes_by_http_as_well(traced: Site, collector: Collector) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{traced.ports.http}") as client:
        answer = await client.post("/v1/chat/completions", json=body, headers=dict(TRACED))
    spans = await asyncio.to_thread(collector.wait_for, "generate", "sequence")

    assert answer.status_code == 200
    assert {spans["generate"].trace_id, spans["sequence"].trace_id} == {TRACE_ID}


async def test_what_a_client_does_not_sample_is_not_traced(traced: Site, collector: Collector) -> None:
    await traced.thought_and_answer(metadata=(("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-00"),))
    await traced.thought_and_answer()
    await asyncio.to_thread(collector.wait_for, "generate", "sequence", "answer")

    assert TRACE_ID not in {span.trace_id for span in collector.spans}


async def test_a_request_that_is_cancelled_ends_its_spans(traced: Site, collector: Collector) -> None:
    traced.groups[0].release(num_steps=30)
    stream = traced.stub.Generate(ask(max_tokens=200, ignore_eos=True))
    await stream.read()
    stream.cancel()
    spans = await asyncio.to_thread(collector.wait_for, "generate", "sequence")

    assert spans["generate"].attributes["mull.status"] == "CANCELLED"
    assert spans["sequence"].attributes["mull.finish"] == "cancelled"


def test_a_span_that_begins_after_the_last_step_is_not_met_by_a_loss_before_its_time(collector: Collector) -> None:
    span = sequence_span(collector, lambda spans: spans.on_lost(last_step_s=5.0))

    (event,) = span.proto.events
    assert (event.name, event.time_unix_nano) == ("ranks lost", span.proto.start_time_unix_nano)


def test_a_step_is_counted_once_and_what_has_no_token_is_none(collector: Collector) -> None:
    sampled = SequenceUpdate(1, token_ids=[2])
    forced = SequenceUpdate(1, token_ids=[3, 4], num_forced=2)

    def steps(spans: SequenceSpans) -> None:
        spans.on_updates([SequenceUpdate(1, admitted_cached_tokens=0)], 10.0, 10.1)
        for _ in range(3):
            spans.on_updates([sampled, forced], 11.0, 11.1)

    counted = sequence_span(collector, steps).attributes

    assert (counted["mull.steps"], counted["mull.tokens"]) == (3, 9)


def test_a_router_that_stops_does_not_call_its_engine_lost(collector: Collector) -> None:
    assert sequence_span(collector, lambda _: None).attributes["mull.finish"] == "router ended"


def sequence_span(collector: Collector, happens: Callable[[SequenceSpans], None]) -> SentSpan:
    """Of a request that comes in second 10, at a Router that ends afterwards."""
    tracing = Tracing(Exporting(collector.endpoint, delay_s=0.05), "router")
    spans = SequenceSpans(tracing)
    spans.on_added(SequenceRequest(key=1, prompt_ids=[1], sampling=SamplingParams(), max_tokens=9), 10.0)
    happens(spans)
    spans.clear()
    tracing.close()
    return collector.wait_for("sequence")["sequence"]


async def test_a_collector_that_is_not_there_costs_one_line_and_no_request(
    model: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    async with site(model, endpoint, send_timeout_s=0.5) as untraced:
        for _ in range(3):
            reply = await untraced.thought_and_answer()
            assert reply.completions[0].finished.reason == pb.Finished.REASON_LENGTH
            await asyncio.sleep(0.3)

    lines = [it.getMessage() for it in caplog.records if "opentelemetry" in it.name or it.name == "cluster.spans"]
    assert lines == [f"spans cannot be sent to {endpoint} and are lost meanwhile; serving goes on"] * 2


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\nX: y",
    ],
)
def test_a_trace_that_cannot_be_read_is_none(header: str | None) -> None:
    assert TraceParent.parse(header) is None


@pytest.mark.parametrize("rest", ["", "-what-a-later-version-adds"])
def test_a_trace_is_written_as_it_was_read(rest: str) -> None:
    version = "01" if rest else "00"
    parsed = TraceParent.parse(f"{version}-{TRACE_ID}-{SPAN_ID}-01{rest}")

    assert str(parsed) == f"00-{TRACE_ID}-{SPAN_ID}-01"


def test_a_server_without_tracing_does_not_import_the_sdk() -> None:
    script = (
        "import sys; import cluster.gateway.server, cluster.router.router, cluster.router.sequence_spans; "
        "sys.exit(any(name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter')) for name in sys.modules))"
    )

    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
