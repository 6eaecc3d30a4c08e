"""The Router under Ray Serve with its ranks as actors: start, requests, a killed rank, a killed Router, the end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import grpc
import psutil
import pytest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import ProxyLocation
from ray.serve.handle import DeploymentHandle

from cluster.config import ClusterConfig, EngineConfig, ModelSource, RouterConfig, SecurityConfig
from cluster.router.deployment import RouterDeployment, router_deployment
from mull.v1 import router_pb2 as pb
from mull.v1.router_pb2_grpc import RouterServiceStub
from tests.end_to_end.servers import command_of
from tests.own_ray import own_ray

pytestmark = pytest.mark.timeout(300)

POCKET = Path(__file__).parents[2] / "deploy" / "models" / "pocket"
APP = "router-test"
START_S = 120.0
WAIT_S = 60.0
LONGEST = 3500
"""Tokens: nearly the context."""
NUM_MORE = 50


@pytest.fixture(scope="module")
def handle() -> Iterator[DeploymentHandle]:
    with own_ray(num_cpus=4):
        serve.start(proxy_location=ProxyLocation.Disabled)
        config = ClusterConfig(
            model=ModelSource(path=POCKET, name="pocket"),
            router=RouterConfig(metrics_port=0),
            engine=EngineConfig(tp=2, threads_per_rank=1, kv_memory_bytes=2**24, device="cpu"),
            # A Ray that others started takes an address that others can reach.
            security=SecurityConfig(insecure=True),
        )
        yield serve.run(router_deployment(config), name=APP, route_prefix=None)
        serve.shutdown()


@pytest.fixture
def stub(handle: DeploymentHandle) -> Iterator[RouterServiceStub]:
    address = handle.address.remote().result(timeout_s=START_S)
    with grpc.insecure_channel(address) as channel:
        stub = RouterServiceStub(channel)
        until(lambda: describe(stub).ready, "the ranks to be ready", START_S)
        yield stub


def describe(stub: RouterServiceStub) -> pb.DescribeResponse:
    described = stub.Describe(pb.DescribeRequest(), timeout=WAIT_S, wait_for_ready=True)
    assert not described.failed, described.reason
    return described


def until(condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.02)


def submit(max_tokens: int) -> pb.GatewayMessage:
    # So hot that nothing of it can be drafted: it takes as many steps as it has tokens.
    sampling = pb.RouterSampling(temperature=8, top_p=1, repetition_penalty=1, seed=5)
    return pb.GatewayMessage(submit=pb.Submit(key=1, prompt_ids=[5, 6, 7], max_tokens=max_tokens, sampling=sampling))


def tokens_of(session: Iterable[pb.RouterMessage]) -> Iterator[int]:
    """Of its one request, to its end."""
    for message in session:
        for update in message.updates:
            yield from update.token_ids
            if update.HasField("end"):
                return


def test_ranks_are_processes_of_their_own_at_normal_priority(stub: RouterServiceStub) -> None:
    ranks = describe(stub).ranks

    assert len({rank.pid for rank in ranks} - {os.getpid()}) == 2
    assert [psutil.Process(rank.pid).nice() for rank in ranks] == [os.nice(0)] * 2


def test_a_request_runs_on_two_actors(stub: RouterServiceStub) -> None:
    assert len(list(tokens_of(stub.Session(iter_open([submit(16)]))))) == 16


def test_a_request_outlives_a_rank_that_is_killed(stub: RouterServiceStub) -> None:
    # given: one that is under way for as long as this takes
    before = [rank.pid for rank in describe(stub).ranks]
    session = stub.Session(iter_open([submit(LONGEST)]))
    tokens = tokens_of(session)
    token_ids = [next(tokens)]
    # when
    os.kill(before[1], signal.SIGKILL)
    until(lambda: describe(stub).num_restarts_total == 1, "the loss")
    until(lambda: describe(stub).ready, "another rank")
    # then: it goes on behind what the others had computed
    num_before = describe(stub).num_replayed_tokens_total
    token_ids += islice(tokens, num_before + NUM_MORE)
    session.cancel()
    assert num_before > 0
    assert token_ids == list(tokens_of(stub.Session(iter_open([submit(len(token_ids))]))))
    after = [rank.pid for rank in describe(stub).ranks]
    assert (after[0], after[1] != before[1]) == (before[0], True), "who survived keeps its process and its weights"
    assert describe(stub).num_restarts_total == 1


def test_a_router_that_is_killed_takes_its_ranks_with_it_and_comes_back(
    handle: DeploymentHandle, stub: RouterServiceStub
) -> None:
    ranks = [psutil.Process(rank.pid) for rank in describe(stub).ranks]
    address = handle.address.remote().result(timeout_s=START_S)

    [replica] = [p for p in psutil.Process().children(recursive=True) if "ServeReplica" in command_of(p)]
    replica.kill()

    until(lambda: not any(rank.is_running() for rank in ranks), "the ranks of a killed Router to end")
    until(lambda: address_of(handle) not in (None, address), "a new Router", START_S)


def address_of(handle: DeploymentHandle) -> str | None:
    """None while Serve still knows only the replica that died."""
    try:
        address: str = handle.address.remote().result(timeout_s=START_S)
        return address
    except RayActorError:
        return None


def test_the_end_of_the_app_leaves_no_rank(stub: RouterServiceStub) -> None:
    ranks = [psutil.Process(rank.pid) for rank in describe(stub).ranks]

    serve.delete(APP)

    until(lambda: not any(rank.is_running() for rank in ranks), "the ranks to end")


async def test_a_replica_whose_constructor_failed_ends_without_a_second_error() -> None:
    await RouterDeployment.__del__(SimpleNamespace())


def iter_open(messages: list[pb.GatewayMessage]) -> Iterator[pb.GatewayMessage]:
    """The messages, and then nothing while the session stays open."""
    yield from messages
    while True:
        time.sleep(1)
        yield pb.GatewayMessage(cancel=pb.Cancel(key=10**9))
