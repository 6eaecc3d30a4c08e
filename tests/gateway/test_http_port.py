"""HTTP beside gRPC in one gateway: the same requests, limits and drain over the same link."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2
from tests.gateway.conftest import RunningGateway, ask, until
from tests.gateway.scripted_router import WAIT_S, update

CHAT = {"messages": [{"role": "user", "content": "What is 2+2?"}], "stream": True}


@pytest.fixture
async def client(gateway: RunningGateway) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.ports.http}", timeout=WAIT_S) as client:
        yield client


async def test_http_and_grpc_submit_the_same(gateway: RunningGateway, client: httpx.AsyncClient) -> None:
    gateway.router.on_submit = lambda submit: gateway.router.send(
        update(submit.key, [40], admitted=0, end=router_pb2.End.REASON_LENGTH)
    )
    await client.post("/v1/chat/completions", json={**CHAT, "seed": 7, "max_tokens": 50})
    by_http = await gateway.router.submitted(1)
    call = gateway.stub.Generate(ask(sampling=pb.SamplingOptions(seed=7), max_tokens=50))
    by_grpc = await gateway.router.submitted(2)
    call.cancel()

    by_http.key, by_http.request_id = by_grpc.key, by_grpc.request_id
    assert by_http == by_grpc


async def test_tokens_become_chunks(gateway: RunningGateway, client: httpx.AsyncClient) -> None:
    gateway.router.on_submit = lambda submit: gateway.router.send(update(submit.key, [40], admitted=0))
    async with client.stream("POST", "/v1/chat/completions", json=CHAT) as reply:
        submit = await gateway.router.submitted()
        gateway.router.send(update(submit.key, [41, 42], end=router_pb2.End.REASON_LENGTH))
        text = "".join([piece async for piece in reply.aiter_text()])

    assert '"finish_reason":"length"' in text
    assert text.endswith("data: [DONE]\n\n")


async def test_a_client_that_goes_is_cancelled_at_the_router(
    gateway: RunningGateway, client: httpx.AsyncClient
) -> None:
    gateway.router.on_submit = lambda submit: gateway.router.send(update(submit.key, [40], admitted=0))
    async with client.stream("POST", "/v1/chat/completions", json=CHAT):
        submit = await gateway.router.submitted()

    await gateway.router.cancelled(submit.key)
    await until(lambda: gateway.server.num_streams == 0, "the slot")


async def test_draining_refuses_new_work_with_503_and_lets_streams_end(
    gateway: RunningGateway, client: httpx.AsyncClient
) -> None:
    gateway.router.on_submit = lambda submit: gateway.router.send(update(submit.key, [40], admitted=0))
    async with client.stream("POST", "/v1/chat/completions", json=CHAT) as reply:
        submit = await gateway.router.submitted()
        draining = asyncio.create_task(gateway.server.drain(10))
        await until(lambda: gateway.server.is_draining, "draining")
        refused, ready = await client.post("/v1/chat/completions", json=CHAT), await client.get("/ready")
        gateway.router.send(update(submit.key, [41], end=router_pb2.End.REASON_LENGTH))
        text = "".join([piece async for piece in reply.aiter_text()])

    assert (refused.status_code, ready.status_code) == (503, 503)
    assert "shutting down" in refused.json()["error"]["message"]
    assert text.endswith("data: [DONE]\n\n")
    assert await draining == 0


async def test_a_client_that_does_not_read_is_cut_off(gateway: RunningGateway) -> None:
    """Its socket takes some, then its mailbox passes the bound of 2,000 tokens."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.ports.http, limit=1024)
    body = b'{"messages": [{"role": "user", "content": "hi"}], "stream": true, "max_tokens": 4000, "logprobs": true}'
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: m\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    submit = await gateway.router.submitted()
    gateway.router.send(update(submit.key, admitted=0))
    for _ in range(200_000):
        if submit.key in gateway.router.cancelled_keys:
            break
        gateway.router.send(update(submit.key, [40] * 100))
        await asyncio.sleep(0)
    await gateway.router.cancelled(submit.key)
    writer.close()
    assert not reader.at_eof()


async def test_full_is_429(gateway: RunningGateway, client: httpx.AsyncClient) -> None:
    calls = [gateway.stub.Generate(ask()) for _ in range(8)]
    await gateway.router.submitted(8)
    reply = await client.post("/v1/chat/completions", json=CHAT)

    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")
    for call in calls:
        call.cancel()


async def test_the_server_tells_where_http_is(gateway: RunningGateway) -> None:
    info = await gateway.stub.GetServerInfo(pb.GetServerInfoRequest())

    assert info.http_port == gateway.ports.http
