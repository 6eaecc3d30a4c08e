"""mull.client, sync and asyncio, against a real gateway; its retries and its options."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator

import grpc
import pytest

from cluster.gateway.served_model import ServedModel
from cluster.ports import HeldPorts
from mull.client import (
    AnswerDelta,
    AsyncClient,
    CallFailed,
    Client,
    Finished,
    Message,
    Result,
    RetryPolicy,
    Started,
    Tool,
)
from mull.client.options import chat_request
from mull.client.retries import Retries
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2
from tests.gateway.conftest import RunningGateway, until
from tests.gateway.scripted_router import WAIT_S, update

STOP = router_pb2.End.REASON_STOP
TEXT = 'hm</think>Sure: <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
TOOLS = [Tool("f", "does it", {"type": "object"})]
FAST = RetryPolicy(attempts=10_000, first_pause_s=0.01, longest_pause_s=0.05)


@pytest.fixture
def talking(gateway: RunningGateway, model: ServedModel) -> RunningGateway:
    """Its model says TEXT."""
    ids = model.tokenizer.encode(TEXT)
    gateway.router.on_submit = lambda submit: [
        gateway.router.send(update(submit.key, [token_id], admitted=0, end=STOP if index == len(ids) - 1 else None))
        for index, token_id in enumerate(ids)
    ]
    return gateway


@pytest.fixture
async def client(talking: RunningGateway) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{talking.ports.grpc}", timeout_s=WAIT_S) as made:
        yield made


def check(result: Result) -> None:
    assert (result.thinking, result.answer, result.finish_reason) == ("hm", "Sure: ", "tool_calls")
    assert result.tool_calls[0].arguments == {"a": 1}
    assert result.choices[0].thinking_ended == "natural"
    assert result.message.tool_calls[0].name == "f"
    assert result.usage.thinking_tokens + result.usage.answer_tokens == len(result.choices[0].token_ids)


async def test_a_reply_is_awaited_or_completed(client: AsyncClient) -> None:
    check(await client.chat("hi", tools=TOOLS))
    check(await client.complete("hi", tools=TOOLS))


async def test_events_are_typed_and_the_whole_is_there_after_them(client: AsyncClient) -> None:
    reply = client.chat([{"role": "user", "content": "hi"}], tools=TOOLS, seed=5)
    events = [event async for event in reply]
    assert isinstance(events[0], Started)
    assert events[0].seed == 5
    assert "".join(event.text for event in events if isinstance(event, AnswerDelta)) == "Sure: "
    assert isinstance(events[-1], Finished)
    assert (events[-1].reason, events[-1].phase) == ("tool_calls", "answer")
    assert reply.answer == "Sure: "


async def test_the_sync_client_does_the_same_in_a_thread(talking: RunningGateway) -> None:
    def use() -> None:
        with Client(f"127.0.0.1:{talking.ports.grpc}", timeout_s=WAIT_S) as client:
            reply = client.chat("hi", tools=TOOLS)
            assert reply.answer == "Sure: "
            assert reply.thinking == "hm"
            assert reply.tool_calls[0].name == "f"
            assert len(list(client.chat("hi", tools=TOOLS))) > 5
            check(client.complete("hi", tools=TOOLS))
            assert client.detokenize(client.tokenize("Straße")) == "Straße"
            assert client.models()[0].name == "pocket"
            assert client.server_info().ready

    await asyncio.to_thread(use)


async def test_the_other_calls_of_the_async_client(client: AsyncClient) -> None:
    assert await client.detokenize(await client.tokenize("Straße")) == "Straße"
    assert len(await client.tokenize("hi", templated=True)) > len(await client.tokenize("hi"))
    assert (await client.models())[0].name == "pocket"
    assert (await client.server_info()).ready
    check(await client.stream(chat_request("hi", None, TOOLS, {})))


async def test_leaving_a_reply_cancels_it(gateway: RunningGateway) -> None:
    async with AsyncClient(f"127.0.0.1:{gateway.ports.grpc}") as client:
        reply = client.generate([5, 6])
        reading = asyncio.create_task(anext(aiter(reply)))
        submit = await gateway.router.submitted()
        gateway.router.send(update(submit.key, [40], admitted=0))
        await reading
        await reply.aclose()
        await gateway.router.cancelled(submit.key)
        with pytest.raises(RuntimeError, match="has not finished"):
            await reply.result()


async def test_a_refusal_names_the_field_and_is_not_tried_again(client: AsyncClient, talking: RunningGateway) -> None:
    with pytest.raises(CallFailed, match=r"sampling\.top_p") as caught:
        await client.chat("hi", top_p=2, request_id="mine")
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.request_id == "mine"
    assert talking.router.submits == []


async def test_a_server_that_comes_late_is_waited_for(talking: RunningGateway) -> None:
    port = int(talking.router.address.rsplit(":")[-1])
    await talking.router.stop()
    async with AsyncClient(f"127.0.0.1:{talking.ports.grpc}", retry=FAST, timeout_s=WAIT_S) as client:
        waiting = asyncio.create_task(client.complete("hi", tools=TOOLS))
        await until(lambda: not talking.server.copies.is_connected, "the Router to be lost")
        await talking.router.start(port)
        check(await waiting)


async def test_a_fault_of_the_servers_is_not_tried_again(gateway: RunningGateway) -> None:
    gateway.router.on_submit = lambda submit: gateway.router.send(
        update(submit.key, [40], admitted=0, end=router_pb2.End.REASON_ERROR, message="lost")
    )
    async with AsyncClient(f"127.0.0.1:{gateway.ports.grpc}", retry=FAST) as client:
        with pytest.raises(CallFailed, match="INTERNAL: lost"):
            await client.chat("hi")
    assert len(gateway.router.submits) == 1


async def test_the_deadline_covers_retries(held_ports: HeldPorts) -> None:
    async with AsyncClient(f"127.0.0.1:{held_ports.hold('127.0.0.1')}", retry=FAST, timeout_s=0.3) as client:
        with pytest.raises(CallFailed) as caught:
            await client.models()
    assert caught.value.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Unavailable(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "gone"

    def trailing_metadata(self) -> None:
        return None


def test_pauses_grow_with_jitter_up_to_a_bound_and_then_end() -> None:
    policy = RetryPolicy(attempts=5, first_pause_s=1, longest_pause_s=3)
    retries = Retries(policy, None, now=lambda: 0.0, jitter=lambda low, high: (low + high) / 2)
    assert [retries.pause_after(Unavailable()) for _ in range(4)] == [0.75, 1.5, 2.25, 2.25]
    with pytest.raises(CallFailed, match="gone"):
        retries.pause_after(Unavailable())


def test_options_become_fields() -> None:
    made = chat_request(
        [Message("user", "hi")], "Be brief.", TOOLS,
        {"stop": "x", "temperature": 0.5, "required_tool": "f", "one_of": ["a"], "format_scope": "all", "n": 2},
    )  # fmt: skip
    assert [turn.role for turn in made.conversation.messages] == ["system", "user"]
    assert (list(made.stop), made.n, made.tool_choice.tool_name) == (["x"], 2, "f")
    assert made.sampling == pb.SamplingOptions(temperature=0.5)
    assert list(made.response_format.choices.texts) == ["a"]
    assert made.response_format.scope == pb.ResponseFormat.SCOPE_ALL


def test_an_unknown_option_or_two_formats_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"'temprature'.*temperature"):
        chat_request("hi", None, (), {"temprature": 1})
    with pytest.raises(ValueError, match="json_object and regex"):
        chat_request("hi", None, (), {"json_object": True, "regex": "a"})


def test_the_client_needs_only_grpc_and_protobuf() -> None:
    code = (
        "import sys, mull.client; heavy = {'cluster', 'workers', 'torch', 'ray', 'pydantic', 'numpy', 'google.rpc'};"
        "print(heavy & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")
