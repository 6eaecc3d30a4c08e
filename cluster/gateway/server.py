"""GatewayServer: everything a gateway listens on, started together and drained together.

Hop 1. One grpc.aio server with the generation service, health and reflection; beside it HTTP and Prometheus'
exposition. Health is SERVING only while a Router can take requests. Knows nothing of Ray: the deployment is a thin
shell around it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from cluster.config import GatewayConfig, SecurityConfig
from cluster.errors import ConfigError
from cluster.exposition import Exposition
from cluster.gateway.access import Access
from cluster.gateway.admin import AdminServicer
from cluster.gateway.copies import Copies, CopyDirectory
from cluster.gateway.core import DRAINING, GenerationCore
from cluster.gateway.doorkeeper import Doorkeeper
from cluster.gateway.http.server import BACKLOG, HttpServer
from cluster.gateway.recovery import ReplayPolicy
from cluster.gateway.router_link import LinkTimes
from cluster.gateway.served_model import ServedModel
from cluster.gateway.servicer import GenerationServicer
from cluster.metrics.gateway import COPIES, READY, REPLAYED, STREAMS, GatewayMetrics
from cluster.metrics.process import CERTIFICATES
from cluster.tls import ServerCertificates, certificate_ends
from mull.v1 import admin_pb2, generation_pb2
from mull.v1.admin_pb2_grpc import add_AdminServiceServicer_to_server
from mull.v1.generation_pb2_grpc import add_GenerationServiceServicer_to_server

if TYPE_CHECKING:
    from cluster.spans import Tracing

logger = logging.getLogger(__name__)

SERVICE_NAME = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name
ADMIN_NAME = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name
HEALTH_NAMES = ("", SERVICE_NAME)
STREAMS_FOR_SHORT_CALLS = 64
UNARY_GRACE_S = 1.0
"""For the last events on their way and for short calls, once all streams have ended."""


@dataclass(frozen=True)
class GatewayPorts:
    """Where a gateway listens."""

    grpc: int
    metrics: int
    http: int


class GatewayServer:
    """One gateway: start it, later drain it."""

    def __init__(
        self,
        config: GatewayConfig,
        model: ServedModel,
        directory: CopyDirectory,
        *,
        security: SecurityConfig | None = None,
        registry: CollectorRegistry | None = None,
        link_times: LinkTimes | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`tracing`: where requests are traced; it is closed with this. Raises ConfigError for certificates or keys
        that cannot be used."""
        security = security or SecurityConfig()
        self._config = config
        self._certificates = None if security.tls is None else ServerCertificates(security.tls)
        registry = registry or CollectorRegistry()
        self._metrics = GatewayMetrics(registry)
        self._access = Access(
            security.keys_file, on_refused=self._metrics.on_refused, on_tenants=self._metrics.begin_tenants
        )
        self.copies = Copies(
            directory,
            max_unread_tokens=config.max_unread_tokens,
            policy=ReplayPolicy(timeout_s=config.replay_timeout_s),
            times=link_times,
            tls=security.link_tls,
            on_pause=self._metrics.on_pause,
        )
        self._core = GenerationCore(model, self.copies, self._metrics, max_streams=config.max_streams, tracing=tracing)
        self._tracing = tracing
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the package has no stubs for it
        self._http = HttpServer(self._core, config, self._why_not_ready, self._access, self._certificates)
        self._server: aio.Server | None = None
        self._exposition = Exposition(registry, self._why_not_ready, self._drain_from_thread)
        self._follower: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drainer: asyncio.Task[int] | None = None
        self._show(model.name, security)

    @property
    def core(self) -> GenerationCore:
        """What its protocols share."""
        return self._core

    @property
    def num_streams(self) -> int:
        """Generate streams that are open."""
        return self._core.num_streams

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because it is to stop."""
        return self._core.is_draining

    @property
    def is_serving(self) -> bool:
        """Whether its tasks run as they should; a Router that is away does not count."""
        is_listening = self._server is not None and self._http.is_serving
        is_following = self._follower is not None and not self._follower.done()
        return is_listening and is_following and self.copies.is_working

    async def start(self) -> GatewayPorts:
        """Listen. Raises ConfigError, one line with the remedy, for a port that is taken."""
        self._loop = asyncio.get_running_loop()
        await self._set_health(ready=False)
        metrics_port = self._start_exposition()
        try:
            listener = _listener(self._config.host, self._config.http_port)
            http_port: int = listener.getsockname()[1]
            try:
                grpc_port = await self._start_grpc()
                await self._http.start(listener)
                self._core.http_port = http_port
            except BaseException:
                listener.close()
                raise
        except BaseException:
            self._exposition.stop()
            raise
        self.copies.start()
        self._follower = asyncio.create_task(self._follow_copies(), name="health follower")
        return GatewayPorts(grpc_port, metrics_port, http_port)

    async def drain(self, grace_s: float) -> int:
        """Refuse new requests, let open streams go on for `grace_s`, cancel the rest, and close all ports.

        Returns how many were cancelled. A second call finds nothing to do.
        """
        self._core.refuse_new()
        await self._health.enter_graceful_shutdown()
        num_cut = await self._core.wait_until_idle(grace_s)
        if num_cut:
            await self._core.cut_streams()
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(UNARY_GRACE_S if num_cut == 0 else None)
            self._server = None
        await self._http.stop()
        await self.copies.close()
        self._exposition.stop()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        return num_cut

    def _show(self, model: str, security: SecurityConfig) -> None:
        """What is read when somebody asks for it."""
        show = self._metrics.show
        show(READY, lambda: {(): self._why_not_ready() is None})
        show(COPIES, lambda: self.copies.num_by_state)
        show(STREAMS, lambda: {(): self.num_streams})
        show(REPLAYED, lambda: self.copies.num_replayed_tokens_total)
        show(CERTIFICATES, lambda: certificate_ends(self._certificates, security.link_tls))
        self._metrics.show_process(model)

    def _why_not_ready(self) -> str | None:
        if self._core.is_draining:
            return DRAINING
        state = self.copies.state
        return None if state.ready else state.reason

    async def _start_grpc(self) -> int:
        config = self._config
        server = aio.server(
            options=_server_options(config), interceptors=[Doorkeeper(self._access, config.body_timeout_s)]
        )
        add_GenerationServiceServicer_to_server(GenerationServicer(self._core, self._access), server)
        add_AdminServiceServicer_to_server(AdminServicer(self._core.budgets, self._access), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE_NAME, ADMIN_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        _check_free(config.host, config.grpc_port, "grpc_port")
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"{host}:{config.grpc_port}"
        try:
            if self._certificates is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, self._certificates.grpc_credentials())
        except RuntimeError as error:
            raise ConfigError(f"gateway.grpc_port: cannot listen on {address} ({error}); choose another") from error
        await server.start()
        self._server = server
        return port

    def _start_exposition(self) -> int:
        config = self._config
        try:
            return self._exposition.start(config.metrics_host, config.metrics_port)
        except OSError as error:
            raise _port_error("metrics_port", config.metrics_host, config.metrics_port, error) from error

    def _drain_from_thread(self) -> None:
        """Begin to drain, asked for over the metrics port."""
        assert self._loop is not None, "the port opens in start()"
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        if self._drainer is None:
            self._drainer = asyncio.create_task(self.drain(self._config.drain_s), name="drain")

    async def _follow_copies(self) -> None:
        while True:
            await self.copies.updated()
            state = self.copies.state
            await self._set_health(state.ready)

    async def _set_health(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in HEALTH_NAMES:
            await self._health.set(name, status)


def _server_options(config: GatewayConfig) -> list[tuple[str, int]]:
    return [
        # Without it a second gateway on the node would share the port silently.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_metadata_size", 16 * 1024),
        # A client that went away without closing is noticed within 30 s.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Clients may ping that often too: thoughts can leave a stream silent while it waits for a slot.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # A client that connects and then says nothing, before and after its handshakes.
        ("grpc.server_handshake_timeout_ms", int(1000 * config.head_timeout_s)),
        ("grpc.max_connection_idle_ms", int(1000 * config.idle_timeout_s)),
        # More wait at the client: one connection cannot open streams without end.
        ("grpc.max_concurrent_streams", config.max_streams + STREAMS_FOR_SHORT_CALLS),
    ]


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise _port_error("http_port", host, port, error) from error


def _check_free(host: str, port: int, field: str) -> None:
    """gRPC logs lines of its own when a bind fails; asking the kernel first leaves ours alone."""
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _port_error(field, host, port, error) from error


def _port_error(field: str, host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"gateway.{field}: cannot listen on {host}:{port} ({error.strerror}); choose another port, 0 picks a free one"
    )
