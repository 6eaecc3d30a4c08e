"""API keys at a gateway's doors, gRPC and HTTP: who gets in, within which limits, and apart from whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from cluster.config import GatewayConfig, SecurityConfig
from cluster.gateway.copies import static_addresses
from cluster.gateway.served_model import ServedModel
from cluster.gateway.server import GatewayServer
from cluster.keys import Scope, add_key, revoke_key
from mull.v1 import admin_pb2, generation_pb2, router_pb2
from mull.v1 import generation_pb2 as pb
from mull.v1.admin_pb2_grpc import AdminServiceStub
from mull.v1.generation_pb2_grpc import GenerationServiceStub
from tests.gateway.conftest import FAST, ask, until
from tests.gateway.scripted_router import ScriptedRouter, update

SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
)
METHODS = [(service, method.name) for service in SERVICES for method in service.methods]
HTTP_CALLS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/pocket"),
    ("GET", "/nothing/here"),
]
STOP = router_pb2.End.REASON_STOP
Metadata = tuple[tuple[str, str], ...]


@dataclass
class Guarded:
    """A gateway that asks for keys."""

    keys_file: Path
    router: ScriptedRouter
    stub: GenerationServiceStub
    admin: AdminServiceStub
    channel: grpc.aio.Channel
    http: httpx.AsyncClient
    server: GatewayServer
    acme: str
    other: str
    operator: str
    registry: CollectorRegistry

    def answer(self, *token_ids: int) -> None:
        """Let every request end with these tokens."""
        send = self.router.send
        self.router.on_submit = lambda submit: send(update(submit.key, token_ids, admitted=0, end=STOP))

    def num_refused(self, reason: str) -> float | None:
        return self.registry.get_sample_value("mull_calls_refused_total", {"reason": reason})

    def change_limits(self, tenant: str, **limits: Any) -> None:
        add_key(self.keys_file, tenant, frozenset({Scope.GENERATE}), limits)


@pytest.fixture
async def guarded(
    router: ScriptedRouter, model: ServedModel, gateway_config: GatewayConfig, tmp_path: Path
) -> AsyncIterator[Guarded]:
    file = tmp_path / "keys.yaml"
    acme = add_key(file, "acme", frozenset({Scope.GENERATE}), {})
    other = add_key(file, "other", frozenset({Scope.GENERATE}), {})
    operator = add_key(file, "operator", frozenset({Scope.ADMIN}), {})
    security, registry = SecurityConfig(keys_file=file), CollectorRegistry()
    server = GatewayServer(
        gateway_config, model, static_addresses(router.address), link_times=FAST, security=security, registry=registry
    )
    ports = await server.start()
    await until(lambda: server.copies.state.ready and router.has_session, "the link to the Router")
    url = f"http://127.0.0.1:{ports.http}"
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel,
        httpx.AsyncClient(base_url=url, timeout=60) as client,
    ):
        stubs = GenerationServiceStub(channel), AdminServiceStub(channel)
        yield Guarded(file, router, *stubs, channel, client, server, acme, other, operator, registry)
        await server.drain(0)


def bearer(key: str) -> Metadata:
    return (("authorization", f"Bearer {key}"),)


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value


async def code_of(guarded: Guarded, service: Any, name: str, metadata: Metadata) -> grpc.StatusCode:
    """How a call with an empty message ends."""
    call = guarded.channel.unary_stream(f"/{service.full_name}/{name}")(b"", metadata=metadata, timeout=60)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize(("service", "name"), METHODS, ids=[name for _, name in METHODS])
async def test_no_method_answers_without_a_key(guarded: Guarded, service: Any, name: str) -> None:
    wrong = guarded.acme[:-1] + ("A" if guarded.acme[-1] != "A" else "B")
    twice = (*bearer(guarded.acme), *bearer(guarded.acme))
    for metadata in ((), bearer(""), bearer(wrong), bearer("mull-000000000000-" + "A" * 43), twice):
        assert await code_of(guarded, service, name, metadata) is grpc.StatusCode.UNAUTHENTICATED


async def test_health_needs_no_key(guarded: Guarded) -> None:
    reply = await health_pb2_grpc.HealthStub(guarded.channel).Check(health_pb2.HealthCheckRequest())

    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    for path in ("/", "/health", "/ready", "/version"):
        assert (await guarded.http.get(path)).status_code == 200


@pytest.mark.parametrize(("verb", "path"), HTTP_CALLS)
async def test_no_path_answers_without_a_key(guarded: Guarded, verb: str, path: str) -> None:
    headers: dict[str, str]
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": f"Basic {guarded.acme}"}):
        answer = await guarded.http.request(verb, path, headers={**headers, "x-request-id": "r-1"})

        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"] == "r-1"


async def test_a_key_opens_what_its_scopes_name(guarded: Guarded) -> None:
    generate, admin = SERVICES
    for key, is_generating in ((guarded.acme, True), (guarded.operator, False)):
        codes = {name: await code_of(guarded, service, name, bearer(key)) for service, name in METHODS}
        denied = {name for name, code in codes.items() if code is grpc.StatusCode.PERMISSION_DENIED}
        generating = {"Generate", "Complete", "Tokenize", "Detokenize"}
        assert denied == ({method.name for method in admin.methods} if is_generating else generating)
        assert grpc.StatusCode.UNAUTHENTICATED not in codes.values()
    assert {"ListModels", "GetServerInfo"} < {method.name for method in generate.methods}

    answer = await guarded.http.post("/tokenize", json={"prompt": "x"}, headers=dict(bearer(guarded.operator)))
    assert answer.status_code == 403
    answer = await guarded.http.get("/v1/models", headers=dict(bearer(guarded.operator)))
    assert answer.status_code == 200


async def test_keys_that_are_added_and_revoked_count_at_once(guarded: Guarded) -> None:
    new = add_key(guarded.keys_file, "new", frozenset({Scope.GENERATE}), {})
    assert (await guarded.stub.ListModels(pb.ListModelsRequest(), metadata=bearer(new))).models

    revoke_key(guarded.keys_file, new.split("-")[1])
    call = guarded.stub.ListModels(pb.ListModelsRequest(), metadata=bearer(new))
    assert (await refusal(call)).code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_file_that_went_wrong_leaves_the_keys_from_before(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    guarded.keys_file.write_text("keys: [")

    for _ in range(3):
        assert (await guarded.stub.ListModels(pb.ListModelsRequest(), metadata=bearer(guarded.acme))).models
    assert [record.levelname for record in caplog.records if "keys.yaml" in record.message] == ["ERROR"]


async def test_tenants_have_salts_of_their_own_and_keys_of_one_tenant_share_it(guarded: Guarded) -> None:
    second = add_key(guarded.keys_file, "acme", frozenset({Scope.GENERATE}), {})
    guarded.router.on_submit = lambda submit: guarded.router.send(
        update(submit.key, [41, 151645], admitted=0, end=STOP)
    )

    for key in (guarded.acme, second, guarded.other):
        await guarded.stub.Complete(ask(), metadata=bearer(key), timeout=60)

    salts = [submit.cache_salt for submit in guarded.router.submits]
    assert salts[0] == salts[1] != salts[2]
    assert all(salts)


async def test_an_operator_lowers_the_budgets_of_one_tenant_alone(guarded: Guarded) -> None:
    calls = [
        guarded.stub.Generate(ask(request_id="same"), metadata=bearer(key)) for key in (guarded.acme, guarded.other)
    ]
    readers = [asyncio.create_task(call.read()) for call in calls]
    await guarded.router.submitted(2)

    lower = admin_pb2.SetThinkingBudgetRequest(tenant="other", thinking_budget=7)
    denied = await refusal(guarded.admin.SetThinkingBudget(lower, metadata=bearer(guarded.acme)))
    done = await guarded.admin.SetThinkingBudget(lower, metadata=bearer(guarded.operator))
    await guarded.router.budgeted(1)

    of_other = [submit.key for submit in guarded.router.submits if submit.cache_salt == "other"]
    assert denied.code() is grpc.StatusCode.PERMISSION_DENIED
    assert done.num_lowered == 1
    assert guarded.router.budgets == [(of_other[0], 7)]
    for call in calls:
        call.cancel()
    await asyncio.gather(*readers, return_exceptions=True)


async def test_over_a_limit_a_call_is_told_when_to_come_again(guarded: Guarded) -> None:
    guarded.change_limits("acme", max_requests_per_s=0.01)
    request, headers = pb.TokenizeRequest(text="x"), dict(bearer(guarded.acme))
    await guarded.stub.Tokenize(request, metadata=bearer(guarded.acme))

    refused = await refusal(guarded.stub.Tokenize(request, metadata=bearer(guarded.acme)))
    answer = await guarded.http.post("/tokenize", json={"prompt": "x"}, headers=headers)

    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert 0 < retry_info(refused).retry_delay.ToTimedelta().total_seconds() <= 100
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(answer.headers["retry-after"]) <= 100
    assert (await guarded.stub.Tokenize(request, metadata=bearer(guarded.other))).token_ids


async def test_calls_that_are_kept_out_are_counted_by_reason(guarded: Guarded) -> None:
    guarded.change_limits("acme", max_requests_per_s=0.01)
    request = pb.TokenizeRequest(text="x")
    for key in (guarded.acme, guarded.acme, "nothing", guarded.operator):
        await asyncio.gather(guarded.stub.Tokenize(request, metadata=bearer(key)), return_exceptions=True)
    await guarded.http.post("/tokenize", json={"prompt": "x"})

    counts = {reason: guarded.num_refused(reason) for reason in ("requests", "unauthenticated", "forbidden", "streams")}
    assert counts == {"requests": 1, "unauthenticated": 2, "forbidden": 1, "streams": 0}


def retry_info(error: grpc.aio.AioRpcError) -> error_details_pb2.RetryInfo:
    details = next(value for key, value in error.trailing_metadata() or () if key == "grpc-status-details-bin")
    info = error_details_pb2.RetryInfo()
    assert status_pb2.Status.FromString(details).details[0].Unpack(info)
    return info


async def test_a_stream_counts_until_it_ends_whoever_ends_it(guarded: Guarded) -> None:
    guarded.change_limits("acme", max_streams=1)
    first = guarded.stub.Generate(ask(), metadata=bearer(guarded.acme))
    reader = asyncio.create_task(first.read())
    await guarded.router.submitted(1)
    over = await refusal(guarded.stub.Complete(ask(), metadata=bearer(guarded.acme)))

    first.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await until(lambda: guarded.server.num_streams == 0, "the end of the stream")
    guarded.router.on_submit = lambda submit: guarded.router.send(
        update(submit.key, [41, 151645], admitted=0, end=STOP)
    )

    assert over.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await guarded.stub.Complete(ask(), metadata=bearer(guarded.acme), timeout=60)).completions


@pytest.mark.parametrize("limit", ["max_prompt_tokens_per_min", "max_output_tokens_per_min"])
async def test_tokens_are_counted_where_they_are_used(guarded: Guarded, limit: str) -> None:
    guarded.change_limits("acme", **{limit: 3})
    guarded.answer(41, 42, 43, 44, 151645)
    await guarded.stub.Complete(ask(), metadata=bearer(guarded.acme), timeout=60)

    refused = await refusal(guarded.stub.Complete(ask(), metadata=bearer(guarded.acme), timeout=60))

    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert limit.split("_")[1] in (refused.details() or "")


@pytest.mark.parametrize(
    ("asked", "limits", "budget", "priority"),
    [
        ({}, {}, None, 0),
        ({"priority": 9, "thinking_budget": 100}, {}, 100, 9),
        ({}, {"max_thinking_budget": 50, "max_priority": -3}, 50, -3),
        ({"priority": 9, "thinking_budget": 100}, {"max_thinking_budget": 50, "max_priority": 3}, 50, 3),
        ({"priority": 1, "thinking_budget": 10}, {"max_thinking_budget": 50, "max_priority": 3}, 10, 1),
        ({"max_tokens": 20}, {"max_thinking_budget": 50}, 50, 0),
    ],
)
async def test_budget_and_priority_stay_within_the_tenants(
    guarded: Guarded, asked: dict[str, int], limits: dict[str, int], budget: int | None, priority: int
) -> None:
    guarded.change_limits("acme", **limits)
    guarded.router.on_submit = lambda submit: guarded.router.send(
        update(submit.key, [41, 151645], admitted=0, end=STOP)
    )

    await guarded.stub.Complete(ask(**asked), metadata=bearer(guarded.acme), timeout=60)

    submit = guarded.router.submits[-1]
    assert (submit.thinking_budget if submit.HasField("thinking_budget") else None) == budget
    assert submit.priority == priority


async def test_chat_over_http_runs_for_the_tenant_of_its_key(guarded: Guarded) -> None:
    guarded.router.on_submit = lambda submit: guarded.router.send(
        update(submit.key, [41, 151645], admitted=0, end=STOP)
    )
    body = {"messages": [{"role": "user", "content": "Hi"}]}

    answer = await guarded.http.post("/v1/chat/completions", json=body, headers=dict(bearer(guarded.other)))

    assert answer.status_code == 200, answer.text
    assert guarded.router.submits[-1].cache_salt == "other"


async def test_a_stream_that_is_kept_is_read_on_by_its_tenant_alone(guarded: Guarded) -> None:
    guarded.answer(41, 42, 151645)
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "stream_options": {"resumable": True}}
    path, mine, others = "/v1/chat/completions", dict(bearer(guarded.acme)), dict(bearer(guarded.other))
    whole = await guarded.http.post(path, json=body, headers=mine)
    first_id = next(line for line in whole.text.splitlines() if line.startswith("id: ")).removeprefix("id: ")

    mine_again = await guarded.http.get(path, headers={**mine, "last-event-id": first_id})
    stolen = await guarded.http.get(path, headers={**others, "last-event-id": first_id})
    unknown = await guarded.http.get(path, headers={**others, "last-event-id": "0" * 32 + ":0"})

    assert mine_again.status_code == 200
    assert mine_again.text in whole.text
    assert (stolen.status_code, stolen.json()) == (unknown.status_code, unknown.json())
    assert stolen.status_code >= 400


async def test_figures_are_told_by_tenant_from_the_start(guarded: Guarded) -> None:
    guarded.answer(40, 1000)

    async for _ in guarded.stub.Generate(ask(), metadata=bearer(guarded.acme)):
        pass

    def tokens(tenant: str) -> float | None:
        labels = {"phase": "thinking", "tenant": tenant}
        return guarded.registry.get_sample_value("mull_generation_tokens_total", labels)

    assert (tokens("acme"), tokens("other"), tokens(""), tokens("newcomer")) == (2, 0, None, None)
    guarded.change_limits("newcomer")
    await guarded.stub.ListModels(pb.ListModelsRequest(), metadata=bearer(guarded.acme))
    assert tokens("newcomer") == 0
