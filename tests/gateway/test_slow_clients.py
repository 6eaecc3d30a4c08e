"""Clients that hold connections and calls open without sending what they must: closed after their time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc.aio
import pytest

from cluster.config import GatewayConfig
from mull.v1 import generation_pb2 as pb
from tests.gateway.conftest import RunningGateway
from tests.gateway.scripted_router import WAIT_S

SHORT_S = 0.2
GENERATE = "/mull.v1.GenerationService/Generate"
HEAD = b"POST /tokenize HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture
def times() -> dict[str, float]:
    """Those that a test waits for; the others are longer than any machine stands still."""
    return {}


@pytest.fixture
def gateway_config(times: dict[str, float]) -> GatewayConfig:
    patient = {"head_timeout_s": WAIT_S, "body_timeout_s": WAIT_S, "idle_timeout_s": WAIT_S}
    return GatewayConfig(grpc_port=0, http_port=0, metrics_port=0, drain_s=5, **(patient | times))


short_head = pytest.mark.parametrize("times", [{"head_timeout_s": SHORT_S}], ids=["short head"])
short_body = pytest.mark.parametrize("times", [{"body_timeout_s": SHORT_S}], ids=["short body"])
short_idle = pytest.mark.parametrize("times", [{"idle_timeout_s": 1.0}], ids=["short idle"])


@pytest.fixture
async def connection(gateway: RunningGateway) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.ports.http)
    yield reader, writer
    writer.close()


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes the connection, or resets it where it was still being sent to."""
    received = b""
    async with asyncio.timeout(WAIT_S):
        with suppress(ConnectionResetError):
            while chunk := await reader.read(4096):
                received += chunk
    return received


@short_head
async def test_a_connection_that_says_nothing_is_closed(connection: Connection) -> None:
    assert await rest(connection[0]) == b""


@short_head
@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"])
async def test_a_head_that_comes_byte_by_byte_is_cut_off(connection: Connection, before: bytes) -> None:
    reader, writer = connection
    writer.write(before + b"GET /health HTTP/1.1\r\n")

    async def drip() -> None:
        while True:
            writer.write(b"x: y\r\n")
            await asyncio.sleep(SHORT_S / 20)

    dripping = asyncio.create_task(drip())
    answered = await rest(reader)
    dripping.cancel()

    assert answered.count(b"200 OK") == (1 if before else 0)


@short_body
async def test_a_body_that_does_not_come_is_408(connection: Connection) -> None:
    reader, writer = connection
    writer.write(HEAD + b"content-length: 100\r\n\r\n{")

    answer = await rest(reader)

    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer


async def test_a_head_without_end_is_refused(connection: Connection) -> None:
    reader, writer = connection
    writer.write(HEAD + b"x: " + b"y" * 200_000 + b"\r\n\r\n")

    assert (await rest(reader)).startswith(b"HTTP/1.1 400")


@short_idle
async def test_an_idle_connection_is_closed_and_a_busy_one_is_not(
    gateway: RunningGateway, connection: Connection
) -> None:
    reader, writer = connection
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")

    answer = await rest(reader)

    assert answer.startswith(b"HTTP/1.1 200")
    with pytest.raises(grpc.aio.AioRpcError) as late:  # the gRPC port serves on
        await gateway.stub.Complete(pb.GenerateRequest(), timeout=WAIT_S)
    assert late.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@short_body
async def test_a_call_whose_message_does_not_come_is_ended(gateway: RunningGateway) -> None:
    call = gateway.channel.stream_stream(GENERATE)()

    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await asyncio.wait_for(call.read(), WAIT_S)

    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_call_without_a_message_is_refused(gateway: RunningGateway) -> None:
    call = gateway.channel.stream_stream(GENERATE)()
    await call.done_writing()

    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await asyncio.wait_for(call.read(), WAIT_S)

    assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@short_idle
async def test_an_idle_grpc_connection_is_closed(gateway: RunningGateway) -> None:
    address = f"127.0.0.1:{gateway.ports.grpc}"
    async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        await channel.channel_ready()

        async with asyncio.timeout(WAIT_S):
            await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
