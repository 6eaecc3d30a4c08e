"""Both ports of a whole gateway under random requests: no answer is a fault of ours, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from hypothesis import HealthCheck, given, settings

from cluster.config import GatewayConfig
from cluster.gateway.http.exchanges import Exchanges
from cluster.gateway.http.kept import KeepPolicy, KeptStreams
from cluster.gateway.http.openapi import openapi_document
from cluster.gateway.http.routes import build_http_app
from tests.fuzzing.echo_site import EchoSite, echo_site
from tests.fuzzing.http_calls import POST_OPERATIONS, fault_of, http_calls
from tests.fuzzing.targets import METHODS, OURS, end_of, grpc_calls

SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
NUM_EXAMPLES = 120
NUM_HTTP_EXAMPLES = 15


@pytest.fixture(scope="module")
def site() -> Iterator[EchoSite]:
    with echo_site() as running:
        yield running


@pytest.fixture(scope="module")
def channel(site: EchoSite) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{site.ports.grpc}") as opened:
        yield opened


def test_no_message_ends_in_a_fault_of_ours_and_nothing_is_left_of_it(site: EchoSite, channel: grpc.Channel) -> None:
    before = site.num_tasks()

    @settings(max_examples=NUM_EXAMPLES, **SETTINGS)
    @given(call=grpc_calls())
    def shoot(call: tuple[str, bytes]) -> None:
        assert end_of(channel, *call) not in OURS

    shoot()
    site.wait_for_streams()
    site.wait_for_tasks(at_most=before)


def test_bytes_that_are_no_message_are_the_callers_fault(channel: grpc.Channel) -> None:
    for path in METHODS:
        assert end_of(channel, path, b"\xff\xff\xff") is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("path", POST_OPERATIONS)
def test_no_http_request_ends_in_a_fault_of_ours(site: EchoSite, path: str) -> None:
    @settings(max_examples=NUM_HTTP_EXAMPLES, **SETTINGS)
    @given(call=http_calls(path))
    def shoot(call: object) -> None:
        assert fault_of(call, f"http://127.0.0.1:{site.ports.http}") is None

    shoot()
    site.wait_for_streams()


def test_the_document_has_every_route_that_is_served() -> None:
    kept = KeptStreams(KeepPolicy(retention_s=1, max_streams=1, max_bytes=1))
    app = build_http_app(None, GatewayConfig(), lambda: None, Exchanges(), kept)  # type: ignore[arg-type]  # none is asked
    served = {route.path.replace(":path", "") for route in app.routes}  # type: ignore[attr-defined]  # all have paths

    assert served - {"/", "/openapi.json"} == set(openapi_document()["paths"])
