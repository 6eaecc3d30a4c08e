"""What a gateway offers beside Generate: health, reflection, models, info, metrics, ports, draining."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.config import GatewayConfig
from cluster.errors import ConfigError
from cluster.gateway.copies import static_addresses
from cluster.gateway.served_model import ServedModel
from cluster.gateway.server import SERVICE_NAME, GatewayPorts, GatewayServer
from cluster.ports import HeldPorts
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2
from mull.v1.generation_pb2_grpc import GenerationServiceStub
from tests.gateway.conftest import FAST, RunningGateway, ask, kinds, until
from tests.gateway.scripted_router import update

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
NOWHERE = static_addresses("127.0.0.1:1")


async def test_health_follows_the_router(gateway: RunningGateway) -> None:
    # given: a ready Router
    assert await gateway.health() == SERVING
    assert await gateway.health(SERVICE_NAME) == SERVING
    # when: it says that it is not
    gateway.router.description.ready = False
    gateway.router.description.reason = "rank 1 is lost"
    await until(lambda: not gateway.server.copies.state.ready, "the Router to be known as not ready")
    await asyncio.sleep(0)
    # then
    assert await gateway.health() == NOT_SERVING
    assert await gateway.health(SERVICE_NAME) == NOT_SERVING
    info = await gateway.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert not info.ready
    assert info.reason == "rank 1 is lost"


async def test_a_gateway_without_a_router_is_up_but_not_serving(model: ServedModel) -> None:
    server = GatewayServer(GatewayConfig(grpc_port=0, http_port=0, metrics_port=0), model, NOWHERE, link_times=FAST)
    ports = await server.start()
    await until(lambda: "out of reach" in server.copies.state.reason, "the first try to connect")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
        stub = GenerationServiceStub(channel)
        info = await stub.GetServerInfo(pb.GetServerInfoRequest())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(ask()).read()
    await server.drain(0)
    assert not info.ready
    assert info.reason
    assert list(info.routers) == []
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    # Who runs the server is told what the connection said, clients are not told of addresses.
    assert "127.0.0.1" in info.reason
    assert caught.value.details() == "the Router is out of reach; try again soon"


async def test_reflection_lists_the_services(gateway: RunningGateway) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(gateway.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    replies = [reply async for reply in stub.ServerReflectionInfo(iter([request]))]
    names = {service.name for service in replies[0].list_services_response.service}
    assert {"mull.v1.GenerationService", "grpc.health.v1.Health"} <= names


async def test_list_models_tells_limits_and_defaults(gateway: RunningGateway) -> None:
    (model,) = (await gateway.stub.ListModels(pb.ListModelsRequest())).models
    assert (model.name, model.max_model_len, model.vocab_size) == ("pocket", 4096, 1024)
    assert model.defaults.temperature == pytest.approx(0.6)
    assert model.defaults.top_k == 20


async def test_the_kv_pool_bounds_what_the_gateway_takes(gateway: RunningGateway) -> None:
    # given: a Router whose KV pool holds less than the model's context
    gateway.router.description.max_model_len = 100
    await until(lambda: gateway.server.copies.context_limit == 100, "the Router's limit")
    gateway.router.on_submit = lambda submit: gateway.router.send(
        update(submit.key, [5], admitted=0, end=router_pb2.End.REASON_LENGTH)
    )
    prompt = pb.TokenIds(ids=[5] * 40)
    # then: in the list, for an absent and a given max_tokens, and for a prompt that is too long
    (listed,) = (await gateway.stub.ListModels(pb.ListModelsRequest())).models
    assert listed.max_model_len == 100
    assert [event async for event in gateway.stub.Generate(pb.GenerateRequest(token_ids=prompt))]
    assert (await gateway.router.submitted()).max_tokens == 60
    with pytest.raises(grpc.aio.AioRpcError, match="send at most 60"):
        await gateway.stub.Generate(pb.GenerateRequest(token_ids=prompt, max_tokens=61)).read()
    with pytest.raises(grpc.aio.AioRpcError, match="context holds 100 with the output"):
        await gateway.stub.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 100))).read()


async def test_a_router_that_has_more_room_than_the_context_changes_nothing(gateway: RunningGateway) -> None:
    gateway.router.description.max_model_len = 10**6
    await until(lambda: gateway.server.copies.context_limit == 10**6, "the Router's limit")
    (listed,) = (await gateway.stub.ListModels(pb.ListModelsRequest())).models
    assert listed.max_model_len == 4096


async def test_a_fault_in_asking_the_router_does_not_end_the_asking(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given: a fault that is not a status
    copies = gateway.server.copies
    answer = gateway.router.description
    monkeypatch.setattr("cluster.gateway.router_link.pb.DescribeRequest", lambda: 1 / 0)
    await until(lambda: "ZeroDivisionError" in copies.state.whole_reason, "the fault to be told")
    # when
    monkeypatch.undo()
    # then
    await until(lambda: answer in copies.state.descriptions.values(), "the Router to be asked again")
    assert copies.is_connected


async def test_server_info_has_the_routers_own_words(gateway: RunningGateway) -> None:
    gateway.router.description.num_running = 9
    info = await gateway.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert info.ready
    assert info.version
    assert info.routers[0].num_running == 9


@pytest.mark.parametrize("field", ["grpc_port", "http_port", "metrics_port"])
async def test_a_busy_port_is_one_line_with_the_remedy(gateway: RunningGateway, model: ServedModel, field: str) -> None:
    taken = gateway.ports.grpc if field == "grpc_port" else gateway.ports.metrics
    config = GatewayConfig(**{"grpc_port": 0, "http_port": 0, "metrics_port": 0, field: taken})
    with pytest.raises(ConfigError, match=rf"{field}.*{taken}.*choose another") as caught:
        await GatewayServer(config, model, NOWHERE).start()
    assert "\n" not in str(caught.value)


async def test_draining_lets_a_stream_end_and_refuses_new_ones(gateway: RunningGateway) -> None:
    # given: a stream under way
    call = gateway.stub.Generate(ask())
    submit = await gateway.router.submitted()
    gateway.router.send(update(submit.key, [40], admitted=0))
    await call.read()
    # when
    draining = asyncio.create_task(gateway.server.drain(10))
    await until(lambda: gateway.server.is_draining, "draining")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await gateway.stub.Generate(ask()).read()
    assert await gateway.health() == NOT_SERVING
    gateway.router.send(update(submit.key, [41], end=router_pb2.End.REASON_LENGTH))
    # then
    events = [await call.read() for _ in range(4)]
    assert kinds(events) == ["thinking_delta", "thinking_delta", "thinking_ended", "finished"]
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert await draining == 0


async def test_draining_cuts_what_does_not_end_in_time(gateway: RunningGateway) -> None:
    call = gateway.stub.Generate(ask())
    await gateway.router.submitted()
    assert await gateway.server.drain(0.05) == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert gateway.server.num_streams == 0


async def test_ports_are_free_again_after_draining(model: ServedModel, held_ports: HeldPorts) -> None:
    grpc_port, http_port, metrics_port = (held_ports.hold("127.0.0.1") for _ in range(3))
    config = GatewayConfig(grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port)
    for _ in range(2):
        server = GatewayServer(config, model, NOWHERE, link_times=FAST)
        assert await server.start() == GatewayPorts(config.grpc_port, config.metrics_port, config.http_port)
        await server.drain(0)


async def test_a_gateway_listens_on_an_ipv6_host(model: ServedModel) -> None:
    server = GatewayServer(
        GatewayConfig(host="::1", grpc_port=0, http_port=0, metrics_port=0), model, NOWHERE, link_times=FAST
    )
    ports = await server.start()
    async with grpc.aio.insecure_channel(f"[::1]:{ports.grpc}") as channel:
        info = await GenerationServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest())
    await server.drain(0)
    assert not info.ready
