"""TLS on the gRPC and HTTP ports and to the Router: who gets in, and certificates that change."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import httpx
import pytest
from cryptography import x509

from cluster.config import GatewayConfig, SecurityConfig, TlsFiles
from cluster.errors import ConfigError
from cluster.gateway.copies import static_addresses
from cluster.gateway.served_model import ServedModel
from cluster.gateway.server import GatewayPorts, GatewayServer
from cluster.tls import LINK_NAME, ServerCertificates, link_server_credentials
from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceStub
from tests.certificates import Authority
from tests.gateway.conftest import FAST, until
from tests.gateway.scripted_router import WAIT_S, ScriptedRouter
from tests.scraping import scraped


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@asynccontextmanager
async def gateway_of(
    security: SecurityConfig, router: ScriptedRouter, model: ServedModel, config: GatewayConfig
) -> AsyncIterator[tuple[GatewayServer, GatewayPorts]]:
    server = GatewayServer(config, model, static_addresses(router.address), link_times=FAST, security=security)
    ports = await server.start()
    try:
        yield server, ports
    finally:
        await server.drain(0)


def security_of(files: TlsFiles) -> SecurityConfig:
    return SecurityConfig(tls_cert=files.cert, tls_key=files.key, tls_client_ca=files.ca)


def channel_credentials(ca: Path, own: TlsFiles | None) -> grpc.ChannelCredentials:
    key, cert = (None, None) if own is None else (own.key.read_bytes(), own.cert.read_bytes())
    return grpc.ssl_channel_credentials(ca.read_bytes(), key, cert)


async def ask_by_grpc(ports: GatewayPorts, ca: Path, own: TlsFiles | None = None) -> pb.ListModelsResponse:
    # A pool of its own: a connection from before would hide the certificates of now.
    options = [("grpc.use_local_subchannel_pool", 1)]
    credentials = channel_credentials(ca, own)
    async with grpc.aio.secure_channel(f"localhost:{ports.grpc}", credentials, options) as channel:
        return await GenerationServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=WAIT_S)


async def ask_by_http(ports: GatewayPorts, ca: Path, own: TlsFiles | None = None) -> httpx.Response:
    context = ssl.create_default_context(cafile=str(ca))
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    async with httpx.AsyncClient(verify=context, timeout=WAIT_S) as client:
        return await client.get(f"https://localhost:{ports.http}/v1/models")


async def serial_number(port: int) -> int:
    """Of the certificate that a new connection is shown."""
    pem = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port), timeout=WAIT_S)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


async def test_both_ports_are_read_with_the_authoritys_certificate_alone(
    authority: Authority, router: ScriptedRouter, model: ServedModel, gateway_config: GatewayConfig
) -> None:
    files = authority.issue("server")

    async with gateway_of(security_of(files), router, model, gateway_config) as (_, ports):
        assert (await ask_by_grpc(ports, authority.ca_file)).models[0].name == "pocket"
        assert (await ask_by_http(ports, authority.ca_file)).status_code == 200
        with pytest.raises(httpx.HTTPError):
            async with httpx.AsyncClient() as plain:
                await plain.get(f"http://localhost:{ports.http}/health")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async with grpc.aio.insecure_channel(f"localhost:{ports.grpc}") as channel:
                await GenerationServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=WAIT_S)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_with_a_client_ca_only_its_certificates_get_in(
    authority: Authority, tmp_path: Path, router: ScriptedRouter, model: ServedModel, gateway_config: GatewayConfig
) -> None:
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other").issue("stranger", "stranger")
    own = authority.issue("client", "client")
    files = authority.issue("server", checks_clients=True)

    async with gateway_of(security_of(files), router, model, gateway_config) as (_, ports):
        assert (await ask_by_grpc(ports, authority.ca_file, own)).models
        assert (await ask_by_http(ports, authority.ca_file, own)).status_code == 200
        for wrong in (None, stranger):
            with pytest.raises(grpc.aio.AioRpcError):
                await ask_by_grpc(ports, authority.ca_file, wrong)
            with pytest.raises((httpx.HTTPError, ssl.SSLError)):
                await ask_by_http(ports, authority.ca_file, wrong)


async def test_a_certificate_that_was_replaced_is_used_without_a_restart(
    authority: Authority, router: ScriptedRouter, model: ServedModel, gateway_config: GatewayConfig
) -> None:
    files = authority.issue("server")
    async with gateway_of(security_of(files), router, model, gateway_config) as (_, ports):
        before = [await serial_number(port) for port in (ports.grpc, ports.http)]

        authority.issue("server")

        after = [await serial_number(port) for port in (ports.grpc, ports.http)]
        assert before[0] == before[1] != after[0] == after[1]


async def test_an_authority_that_was_replaced_is_used_without_a_restart(
    authority: Authority, tmp_path: Path, router: ScriptedRouter, model: ServedModel, gateway_config: GatewayConfig
) -> None:
    (tmp_path / "new").mkdir()
    successor = Authority(tmp_path / "new")
    files = authority.issue("server", checks_clients=True)
    server_ca = tmp_path / "server-ca.pem"
    server_ca.write_bytes(authority.ca_file.read_bytes())
    old, new = authority.issue("client", "client"), successor.issue("client", "client")
    async with gateway_of(security_of(files), router, model, gateway_config) as (_, ports):
        assert (await ask_by_http(ports, server_ca, old)).status_code == 200

        assert files.ca is not None
        files.ca.write_bytes(successor.ca_file.read_bytes())

        assert (await ask_by_http(ports, server_ca, new)).status_code == 200
        assert (await ask_by_grpc(ports, server_ca, new)).models
        with pytest.raises((httpx.HTTPError, ssl.SSLError)):
            await ask_by_http(ports, server_ca, old)


async def test_files_that_do_not_fit_leave_the_certificate_from_before_and_are_told_once(authority: Authority) -> None:
    told: list[str] = []
    files = authority.issue("server")
    good = files.cert.read_bytes()
    certificates = ServerCertificates(files, told.append)

    files.key.write_bytes(authority.issue("other").key.read_bytes())

    assert [certificates.current_chain(), certificates.current_chain()] == [good, good]
    assert len(told) == 1
    assert "server.key" in told[0]


@pytest.mark.parametrize("missing", ["cert", "key", "ca"])
def test_a_server_does_not_start_with_a_file_that_cannot_be_read(authority: Authority, missing: str) -> None:
    files = authority.issue("server", checks_clients=True)
    getattr(files, missing).write_text("no PEM")

    with pytest.raises(ConfigError) as refused:
        ServerCertificates(files)
    assert "\n" not in str(refused.value)


async def test_the_link_to_a_router_needs_certificates_at_both_ends(
    authority: Authority, model: ServedModel, gateway_config: GatewayConfig
) -> None:
    files = authority.issue("link", LINK_NAME, checks_clients=True)
    security = SecurityConfig(link_cert=files.cert, link_key=files.key, link_ca=files.ca)
    router = ScriptedRouter()
    await router.start(credentials=link_server_credentials(files))
    try:
        async with gateway_of(security, router, model, gateway_config) as (server, _):
            await until(lambda: server.copies.state.ready and router.has_session, "the link to the Router")
            num_sessions = router.num_sessions
        async with gateway_of(SecurityConfig(), router, model, gateway_config) as (server, _):
            await until(lambda: "out of reach" in server.copies.state.reason, "a link that is refused")
        assert router.num_sessions == num_sessions == 1
    finally:
        await router.stop()


async def test_the_ports_tell_when_their_certificate_ends(
    authority: Authority, router: ScriptedRouter, model: ServedModel, gateway_config: GatewayConfig
) -> None:
    files = authority.issue("server")
    ends_s = x509.load_pem_x509_certificate(files.cert.read_bytes()).not_valid_after_utc.timestamp()

    async with gateway_of(security_of(files), router, model, gateway_config) as (_, ports):
        said = await scraped(f"127.0.0.1:{ports.metrics}")

    assert said.all("mull_certificate_not_after_timestamp_seconds") == {("ports",): ends_s}
