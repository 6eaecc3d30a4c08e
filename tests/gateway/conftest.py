"""A real gateway on free ports in front of a scripted Router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import GatewayConfig, ModelSource
from cluster.gateway.copies import static_addresses
from cluster.gateway.router_link import LinkTimes
from cluster.gateway.served_model import ServedModel
from cluster.gateway.server import GatewayPorts, GatewayServer
from cluster.ports import HeldPorts
from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceStub
from tests.gateway.scripted_router import WAIT_S, ScriptedRouter

POCKET = Path(__file__).parents[2] / "deploy" / "models" / "pocket"
FAST = LinkTimes(first_pause_s=0.02, longest_pause_s=0.1, poll_starting_s=0.02, poll_ready_s=0.05)


@pytest.fixture(scope="session")
def model() -> ServedModel:
    return ServedModel.load(ModelSource(path=POCKET, name="pocket"))


@dataclass
class RunningGateway:
    """A started gateway, the Router behind it, and a client's stub."""

    server: GatewayServer
    ports: GatewayPorts
    router: ScriptedRouter
    stub: GenerationServiceStub
    channel: grpc.aio.Channel

    async def health(self, service: str = "") -> int:
        reply = await health_pb2_grpc.HealthStub(self.channel).Check(health_pb2.HealthCheckRequest(service=service))
        return reply.status

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        await until(condition, what)


async def until(condition: Callable[[], bool], what: str) -> None:
    """Bounded wait for something that has no event of its own."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110  # there is no event to wait for
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"waited {WAIT_S:g} s for {what}") from None


@pytest.fixture
async def router(held_ports: HeldPorts) -> AsyncIterator[ScriptedRouter]:
    scripted = ScriptedRouter()
    await scripted.start(held_ports.hold("127.0.0.1"))
    yield scripted
    await scripted.stop()


@pytest.fixture
def gateway_config() -> GatewayConfig:
    return GatewayConfig(grpc_port=0, http_port=0, metrics_port=0, max_streams=8, max_unread_tokens=2000, drain_s=5)


@pytest.fixture
async def gateway(
    router: ScriptedRouter, model: ServedModel, gateway_config: GatewayConfig
) -> AsyncIterator[RunningGateway]:
    server = GatewayServer(gateway_config, model, static_addresses(router.address), link_times=FAST)
    ports = await server.start()
    await until(lambda: server.copies.state.ready and router.has_session, "the link to the Router")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
        yield RunningGateway(server, ports, router, GenerationServiceStub(channel), channel)
        await server.drain(0)


def ask(text: str = "What is 2+2?", **more: object) -> pb.GenerateRequest:
    """A request with one user turn."""
    messages = [pb.Message(role="user", content=text)]
    return pb.GenerateRequest(conversation=pb.Conversation(messages=messages), **more)


def kinds(events: list[pb.GenerateEvent]) -> list[str]:
    return [str(event.WhichOneof("event")) for event in events]


def body(event: pb.GenerateEvent) -> Message:
    return getattr(event, str(event.WhichOneof("event")))
