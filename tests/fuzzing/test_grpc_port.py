"""The gRPC port under random messages: whatever comes, no answer is a fault of ours, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mull.v1 import admin_pb2, generation_pb2
from tests.fuzzing.echo_site import EchoSite, echo_site
from tests.fuzzing.messages import messages

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
)
METHODS = {f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods}
OURS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED)
NUM_EXAMPLES = 60
CALL_TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def site() -> Iterator[EchoSite]:
    with echo_site() as running:
        yield running


@pytest.fixture(scope="module")
def channel(site: EchoSite) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{site.ports.grpc}") as opened:
        yield opened


def calls() -> st.SearchStrategy[tuple[str, bytes]]:
    """A method, and a message of its own type or bytes that are none."""

    def to_bytes(path: str) -> st.SearchStrategy[tuple[str, bytes]]:
        good = messages(METHODS[path].input_type).map(lambda message: message.SerializeToString())
        return st.tuples(st.just(path), st.one_of(good, good, good, st.binary(max_size=60)))

    # Those that generate have the most to trip over.
    paths = st.one_of(
        st.sampled_from(sorted(METHODS)), st.sampled_from([p for p in METHODS if p.endswith(("ate", "ete"))])
    )
    return paths.flatmap(to_bytes)


def end_of(channel: grpc.Channel, path: str, message: bytes) -> grpc.StatusCode:
    """How the call ends, all of it read."""
    call: Any = channel.unary_stream(path, None, None)(message, timeout=CALL_TIMEOUT_S)
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(call=calls())
def test_no_message_ends_in_a_fault_of_ours(channel: grpc.Channel, call: tuple[str, bytes]) -> None:
    assert end_of(channel, *call) not in OURS


def test_bytes_that_are_no_message_are_the_callers_fault(channel: grpc.Channel) -> None:
    for path in METHODS:
        assert end_of(channel, path, b"\xff\xff\xff") is grpc.StatusCode.INVALID_ARGUMENT


def test_nothing_is_left_of_them(site: EchoSite, channel: grpc.Channel) -> None:
    before = site.leftovers()

    @settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(call=calls())
    def shoot(call: tuple[str, bytes]) -> None:
        end_of(channel, *call)

    shoot()
    after = site.leftovers()
    assert after["streams"] == 0
    assert after["tasks"] <= before["tasks"]
