"""What the metrics port says and takes beside metrics: readiness, and the wish to drain."""

from __future__ import annotations

import asyncio
import json
from http.client import HTTPConnection
from typing import Any

import grpc
import pytest

from cluster.drain import drain
from cluster.errors import EngineError
from cluster.ports import HeldPorts
from mull.v1 import router_pb2
from tests.gateway.conftest import RunningGateway, ask, kinds, until
from tests.gateway.scripted_router import WAIT_S, update


async def call(gateway: RunningGateway, method: str, path: str) -> tuple[int, dict[str, Any]]:
    def ask_port() -> tuple[int, dict[str, Any]]:
        connection = HTTPConnection("127.0.0.1", gateway.ports.metrics, timeout=WAIT_S)
        connection.request(method, path)
        response = connection.getresponse()
        body = json.loads(response.read())
        connection.close()
        return response.status, body

    return await asyncio.to_thread(ask_port)


async def test_the_metrics_port_is_ready_when_work_can_be_taken(gateway: RunningGateway) -> None:
    assert await call(gateway, "GET", "/ready") == (200, {"ready": True, "reason": None})

    gateway.router.description.ready = False
    gateway.router.description.reason = "rank 1 is lost"
    await until(lambda: not gateway.server.copies.state.ready, "the Router to be known as not ready")

    assert await call(gateway, "GET", "/ready") == (503, {"ready": False, "reason": "rank 1 is lost"})


async def test_draining_is_posted(gateway: RunningGateway) -> None:
    status, _ = await call(gateway, "GET", "/drain")

    assert status == 405
    assert not gateway.server.is_draining


async def test_mull_drain_returns_when_the_last_stream_has_ended(gateway: RunningGateway) -> None:
    # given: a stream under way
    stream = gateway.stub.Generate(ask())
    submit = await gateway.router.submitted()
    gateway.router.send(update(submit.key, [40], admitted=0))
    await stream.read()
    # when: a pod's end is asked for
    draining = asyncio.create_task(asyncio.to_thread(drain, gateway.ports.metrics, delay_s=0, wait_s=WAIT_S))
    await until(lambda: gateway.server.is_draining, "the gateway to drain")
    # then: new work is refused, the stream goes on, and the command waits for it
    status, body = await call(gateway, "GET", "/ready")
    assert (status, body["ready"]) == (503, False)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.stub.Generate(ask()).read()
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not draining.done()
    # when: it ends
    gateway.router.send(update(submit.key, [41], end=router_pb2.End.REASON_LENGTH))
    # then
    events = [await stream.read() for _ in range(4)]
    assert kinds(events)[-1] == "finished"
    assert await draining == "drained"


def test_mull_drain_finds_nothing_to_drain_where_nobody_listens(held_ports: HeldPorts) -> None:
    port = held_ports.hold("127.0.0.1")

    assert drain(port, delay_s=0, wait_s=WAIT_S) == f"nothing listens on port {port}, so there is nothing to drain"


async def test_mull_drain_names_a_port_that_is_not_for_metrics(gateway: RunningGateway) -> None:
    with pytest.raises(EngineError, match=r"answered 40\d to /drain; is it the metrics port"):
        await asyncio.to_thread(drain, gateway.ports.http, delay_s=0, wait_s=WAIT_S)
