"""Resuming over real sockets: clients whose gateway goes away, gateways that take over what they have never seen."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import pytest

from cluster.config import GatewayConfig
from cluster.gateway.copies import static_addresses
from cluster.gateway.served_model import ServedModel
from cluster.gateway.server import GatewayServer
from cluster.ports import HeldPorts
from mull.client import AsyncClient, CallFailed, Client, Event, RetryPolicy, Tool
from mull.client.held import HeldStream
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2
from tests.gateway.conftest import FAST, RunningGateway, ask, kinds, until
from tests.gateway.scripted_router import WAIT_S, ScriptedRouter, update

STOP = router_pb2.End.REASON_STOP
TEXT = 'hm 🙂</think>Sure: <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
TOOLS = [Tool("f", "does it", {"type": "object"})]
RETRY = RetryPolicy(attempts=1, resumptions=10_000, first_pause_s=0.01, longest_pause_s=0.05)


class Model:
    """Says TEXT, from wherever a request is; `num_now` tokens, and then nothing."""

    def __init__(
        self, router: ScriptedRouter, ids: Sequence[int], num_now: int, end: router_pb2.End.Reason = STOP
    ) -> None:
        self.num_now = num_now
        self._end = end
        self._router, self._ids = router, ids
        router.on_submit = self._on_submit

    def _on_submit(self, submit: router_pb2.Submit) -> None:
        self._router.send(update(submit.key, admitted=0))
        start = len(submit.output_ids)
        assert list(submit.output_ids) == list(self._ids[:start])
        self._say(submit.key, start, max(start, min(start + self.num_now, len(self._ids))))

    def _say(self, key: int, start: int, stop: int) -> None:
        for index in range(start, stop):
            is_last = index == len(self._ids) - 1
            said = update(key, [self._ids[index]], end=self._end if is_last else None)
            said.logprobs.add(logprob=-index)
            self._router.send(said)


@asynccontextmanager
async def gateway_at(port: int, router: ScriptedRouter, model: ServedModel) -> AsyncIterator[GatewayServer]:
    config = GatewayConfig(grpc_port=port, http_port=0, metrics_port=0)
    server = GatewayServer(config, model, static_addresses(router.address), link_times=FAST)
    await server.start()
    await until(lambda: server.copies.state.ready, "the link to the Router")
    try:
        yield server
    finally:
        await server.drain(0)


async def test_a_client_whose_gateway_goes_away_gets_the_rest_from_the_next_one(
    router: ScriptedRouter, model: ServedModel, held_ports: HeldPorts
) -> None:
    # given: a client that has some of two generations, in several events
    said = Model(router, model.tokenizer.encode(TEXT), num_now=4)
    port, events = held_ports.hold("127.0.0.1"), list[Event]()
    async with AsyncClient(f"127.0.0.1:{port}", retry=RETRY, timeout_s=WAIT_S) as client:
        async with gateway_at(port, router, model):
            reply = client.chat("hi", tools=TOOLS, n=2, seed=7, logprobs=0)
            reading = asyncio.create_task(read_into(events, aiter(reply)))
            await until(lambda: len(events) >= 6, "the first events")
            num_before = len(events)
        # when: that gateway is gone, and another one is there
        said.num_now = 100
        async with gateway_at(port, router, model):
            await reading
    # then: all is as if nothing had happened
    assert len(router.submits) == 4
    assert all(0 < len(submit.output_ids) <= 4 for submit in router.submits[2:])
    assert 0 < num_before < len(events)
    for choice in (await reply).choices:
        numbers = [event.sequence for event in events if event.choice == choice.index]
        assert numbers == list(range(len(numbers)))
        assert (choice.thinking, choice.answer, choice.finish_reason) == ("hm 🙂", "Sure: ", "tool_calls")
        assert choice.tool_calls[0].arguments == {"a": 1}
        assert [entry.logprob for entry in choice.logprobs] == [-i for i in range(len(choice.token_ids))]
        assert choice.seed == 7 + choice.index


async def read_into(events: list[Event], stream: AsyncIterator[Event]) -> None:
    async for event in stream:
        events.append(event)  # noqa: PERF401  # others look at the list meanwhile


async def test_the_sync_client_resumes_too(router: ScriptedRouter, model: ServedModel, held_ports: HeldPorts) -> None:
    said = Model(router, model.tokenizer.encode(TEXT), num_now=4)
    port = held_ports.hold("127.0.0.1")

    begun = threading.Event()

    def use() -> str:
        with Client(f"127.0.0.1:{port}", retry=RETRY, timeout_s=WAIT_S) as client:
            reply = client.chat("hi", tools=TOOLS)
            next(iter(reply))
            begun.set()
            return reply.answer

    async with gateway_at(port, router, model):
        answer = asyncio.create_task(asyncio.to_thread(use))
        await until(begun.is_set, "the first event")
    said.num_now = 100
    async with gateway_at(port, router, model):
        assert await answer == "Sure: "


async def test_a_client_gives_up_after_so_many_tries_without_an_event(
    router: ScriptedRouter, model: ServedModel, held_ports: HeldPorts
) -> None:
    Model(router, model.tokenizer.encode(TEXT), num_now=4)
    port = held_ports.hold("127.0.0.1")
    few = RetryPolicy(resumptions=3, first_pause_s=0.01, longest_pause_s=0.02)
    async with AsyncClient(f"127.0.0.1:{port}", retry=few, timeout_s=WAIT_S) as client:
        async with gateway_at(port, router, model):
            stream = aiter(client.chat("hi"))
            await anext(stream)
        with pytest.raises(CallFailed) as caught:
            [event async for event in stream]
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


async def cut(gateway: RunningGateway, request: pb.GenerateRequest, num_events: int) -> pb.GenerateRequest:
    """What a client asks for that was cut after so many events."""
    held = HeldStream()
    call = gateway.stub.Generate(request)
    for _ in range(num_events):
        held.add(await call.read())
    call.cancel()
    await until(lambda: gateway.server.num_streams == 0, "the cut stream's end")
    return held.rest_of(request, 0)


async def test_complete_answers_with_the_whole(gateway: RunningGateway, model: ServedModel) -> None:
    said = Model(gateway.router, model.tokenizer.encode(TEXT), num_now=5)
    request = ask()
    request.conversation.tools.append(pb.Tool(name="f"))
    rest = await cut(gateway, request, 4)
    said.num_now = 100
    (whole,) = (await gateway.stub.Complete(rest)).completions
    assert (whole.thinking, whole.answer) == ("hm 🙂", "Sure: ")
    assert list(whole.token_ids) == model.tokenizer.encode(TEXT)
    assert whole.tool_calls[0].arguments_json == '{"a": 1}'


async def test_what_is_over_is_told_again_without_the_router(gateway: RunningGateway, model: ServedModel) -> None:
    # given: a client that has all tokens that may come, and lacks the last event
    ids = model.tokenizer.encode("hm</think>Sure: yes")
    Model(gateway.router, ids, num_now=100, end=router_pb2.End.REASON_LENGTH)
    request = ask(max_tokens=len(ids), sampling=pb.SamplingOptions(seed=1))
    call = gateway.stub.Generate(request)
    events = [event async for event in call]
    held = HeldStream()
    for event in events[:-1]:
        held.add(event)
    # when
    again = [event async for event in gateway.stub.Generate(held.rest_of(request, 0))]
    # then
    assert kinds(again) == ["finished"]
    assert again[0] == events[-1]
    assert len(gateway.router.submits) == 1
    # and of what has finished, nothing more comes
    held.add(events[-1])
    assert [event async for event in gateway.stub.Generate(held.rest_of(request, 0))] == []


async def test_a_resumed_request_waits_for_a_router_where_a_new_one_is_refused(
    gateway: RunningGateway, model: ServedModel
) -> None:
    said = Model(gateway.router, model.tokenizer.encode(TEXT), num_now=3)
    rest = await cut(gateway, ask(), 3)
    gateway.router.description.ready = False
    gateway.router.description.reason = "the ranks are loading"
    await until(lambda: not gateway.server.copies.state.ready, "the Router not to be ready")
    resumed = gateway.stub.Generate(rest)
    with pytest.raises(grpc.aio.AioRpcError, match="the ranks are loading"):
        await gateway.stub.Generate(ask()).read()
    said.num_now = 100
    gateway.router.description.ready = True
    assert kinds([event async for event in resumed])[-1] == "finished"


async def test_a_contradiction_names_the_field(gateway: RunningGateway) -> None:
    request = ask(resume=pb.Resume(choices=[pb.ResumedChoice(token_ids=[40], next_sequence=2)]))
    with pytest.raises(grpc.aio.AioRpcError, match=r"sampling\.seed: missing") as caught:
        await gateway.stub.Generate(request).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    held = pb.ResumedChoice(token_ids=[40], next_sequence=2)
    request = ask(resume=pb.Resume(choices=[held]), sampling=pb.SamplingOptions(seed=1, logprobs=1))
    with pytest.raises(grpc.aio.AioRpcError, match=r"sampling\.logprobs: .*Generate"):
        await gateway.stub.Complete(request)


async def test_a_draining_gateway_hands_its_streams_to_another_one(
    router: ScriptedRouter, model: ServedModel, held_ports: HeldPorts
) -> None:
    # given: two gateways at one address, as behind a Service
    said = Model(router, model.tokenizer.encode(TEXT), num_now=4)
    ports = [held_ports.hold("127.0.0.1") for _ in range(2)]
    address = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
    async with (
        gateway_at(ports[0], router, model) as one,
        AsyncClient(address, retry=RETRY, timeout_s=WAIT_S) as client,
    ):
        reply = client.chat("hi", tools=TOOLS, seed=7)
        stream = aiter(reply)
        events = [await anext(stream) for _ in range(3)]
        async with gateway_at(ports[1], router, model):
            # when: the one that it is at must go, and its time is up
            said.num_now = 100
            num_cut = await one.drain(0.05)
            # then
            events += [event async for event in stream]
    assert num_cut == 1
    assert [event.sequence for event in events] == list(range(len(events)))
    assert (await reply).answer == "Sure: "
