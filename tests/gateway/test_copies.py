"""A gateway in front of several Routers that come, drain, go and hang."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

import grpc
import pytest

from cluster.config import GatewayConfig
from cluster.errors import NotReady
from cluster.gateway.router_link import LinkTimes
from cluster.gateway.served_model import ServedModel
from cluster.gateway.server import GatewayPorts, GatewayServer
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2
from mull.v1.generation_pb2_grpc import GenerationServiceStub
from tests.gateway.conftest import FAST, ask, body, until
from tests.gateway.scripted_router import ScriptedRouter, update

LENGTH = router_pb2.End.REASON_LENGTH


@dataclass
class Site:
    """A gateway, and the Routers that its directory lists."""

    server: GatewayServer
    ports: GatewayPorts
    stub: GenerationServiceStub
    routers: list[ScriptedRouter]
    addresses: list[str] = field(default_factory=list)
    directory_fails: bool = False

    async def directory(self) -> Sequence[str]:
        if self.directory_fails:
            raise NotReady("nobody knows")
        return self.addresses

    async def connected(self, count: int) -> None:
        await until(lambda: len(self.server.copies.state.descriptions) == count, f"{count} copies")

    async def info(self) -> pb.GetServerInfoResponse:
        return await self.stub.GetServerInfo(pb.GetServerInfoRequest())

    def busy(self) -> tuple[ScriptedRouter, ScriptedRouter]:
        """The Router that got the only submit, and the other one."""
        one, other = self.routers
        assert len(one.submits) + len(other.submits) == 1
        return (one, other) if one.submits else (other, one)


@pytest.fixture
def link_times() -> LinkTimes:
    return FAST


@pytest.fixture
async def site(model: ServedModel, link_times: LinkTimes) -> AsyncIterator[Site]:
    routers = [ScriptedRouter(), ScriptedRouter()]
    addresses = [await router.start() for router in routers]

    async def directory() -> Sequence[str]:
        return await made.directory()

    config = GatewayConfig(grpc_port=0, http_port=0, metrics_port=0)
    server = GatewayServer(config, model, directory, link_times=link_times)
    async with grpc.aio.insecure_channel("") as unused:
        made = Site(server, GatewayPorts(0, 0, 0), GenerationServiceStub(unused), routers, addresses)
        made.ports = await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{made.ports.grpc}") as channel:
            made.stub = GenerationServiceStub(channel)
            await made.connected(2)
            await until(lambda: all(router.has_session for router in routers), "both sessions")
            yield made
            await server.drain(0)
    for router in routers:
        await router.stop()


async def running(site: Site) -> tuple[AsyncIterator[pb.GenerateEvent], list[pb.GenerateEvent]]:
    """A stream with two tokens."""
    call = aiter(site.stub.Generate(ask(sampling=pb.SamplingOptions(seed=3))))
    await until(lambda: any(router.submits for router in site.routers), "a submit")
    router, _ = site.busy()
    router.send(update(router.submits[0].key, [40, 41], admitted=0))
    return call, [await anext(call), await anext(call)]


async def finish(
    router: ScriptedRouter, call: AsyncIterator[pb.GenerateEvent], events: list[pb.GenerateEvent]
) -> list[int]:
    """Let the Router end the stream; all of its tokens."""
    router.send(update(router.submits[-1].key, [42], admitted=0, end=LENGTH))
    events += [event async for event in call]
    assert [event.sequence for event in events] == list(range(len(events)))
    return [token for event in events for token in getattr(body(event), "token_ids", [])]


async def test_a_stream_moves_to_the_other_copy_when_its_own_dies(site: Site) -> None:
    call, events = await running(site)
    one, other = site.busy()
    await one.stop()
    submit = await other.submitted()
    assert list(submit.output_ids) == [40, 41]
    assert await finish(other, call, events) == [40, 41, 42]
    assert (await site.info()).ready


async def test_a_draining_router_keeps_its_stream_and_gets_no_new_ones(site: Site) -> None:
    # given
    call, events = await running(site)
    one, other = site.busy()
    one.description = router_pb2.DescribeResponse(ready=False, reason="the Router is stopping", max_model_len=4096)
    site.addresses.remove(one.address)
    await until(lambda: sum(said.ready for said in site.server.copies.state.descriptions.values()) == 1, "the drain")
    # when
    other.on_submit = lambda submit: other.send(update(submit.key, [5], admitted=0, end=LENGTH))
    for _ in range(3):
        assert [event async for event in site.stub.Generate(ask())]
    # then
    assert len(other.submits) == 3
    assert await finish(one, call, events) == [40, 41, 42]


async def test_what_a_draining_router_gives_back_goes_on_at_the_other_one(site: Site) -> None:
    call, events = await running(site)
    one, other = site.busy()
    gone = router_pb2.End.REASON_UNAVAILABLE
    one.send(update(one.submits[0].key, end=gone, message="the Router is stopping"))
    assert list((await other.submitted()).output_ids) == [40, 41]
    assert await finish(other, call, events) == [40, 41, 42]


# Long enough for a machine that stands still for two seconds, short enough for a test.
@pytest.mark.parametrize("link_times", [replace(FAST, describe_timeout_s=2.5, longest_silence_s=1.0)])
async def test_a_stream_leaves_a_router_that_hangs_with_its_connection_open(site: Site) -> None:
    call, events = await running(site)
    one, other = site.busy()
    one.answers.clear()
    assert list((await other.submitted()).output_ids) == [40, 41]
    assert await finish(other, call, events) == [40, 41, 42]
    one.answers.set()


async def test_copies_that_come_and_go_are_found_and_forgotten(site: Site) -> None:
    newcomer = ScriptedRouter()
    site.addresses.append(await newcomer.start())
    await site.connected(3)
    assert len((await site.info()).routers) == 3
    await newcomer.stop()
    site.addresses.remove(newcomer.address)
    await site.connected(2)
    copies = site.server.copies
    await until(lambda: copies.num_by_state == {("ready",): 2, ("not_ready",): 0}, "the newcomer to be forgotten")
    assert newcomer.address not in copies.state.descriptions


async def test_a_directory_that_fails_costs_no_link(site: Site) -> None:
    site.directory_fails = True
    call, events = await running(site)
    one, _ = site.busy()
    assert await finish(one, call, events) == [40, 41, 42]
    assert (await site.info()).ready


async def test_it_is_not_ready_once_no_copy_is_and_says_why_for_each(site: Site) -> None:
    for number, router in enumerate(site.routers):
        router.description.ready = False
        router.description.reason = f"rank {number} is lost"
    await until(lambda: not site.server.copies.state.ready, "no copy to be ready")
    info = await site.info()
    assert (info.ready, set(info.reason.split("; "))) == (False, {"rank 0 is lost", "rank 1 is lost"})


async def test_the_context_is_what_every_copy_has_room_for(site: Site) -> None:
    site.routers[1].description.max_model_len = 100
    await until(lambda: site.server.copies.context_limit == 100, "the smaller limit")
    (listed,) = (await site.stub.ListModels(pb.ListModelsRequest())).models
    assert listed.max_model_len == 100
