"""The Gateway's Ray Serve deployment: a shell that starts a GatewayServer in its replica and drains it.

Serve is the control plane only: the Routers' addresses come by a deployment handle, tokens never do.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray import serve

from cluster.config import ClusterConfig
from cluster.errors import EngineError, NotReady
from cluster.gateway.copies import CopyDirectory
from cluster.gateway.served_model import ServedModel
from cluster.gateway.server import GatewayServer
from cluster.serve_ports import listen_on_node_address
from cluster.tracing import start_tracing
from workers.logs import write_logs

NAME = "Gateway"
HEALTH_PERIOD_S = 2.0
ASK_TIMEOUT_S = 5.0
SHUTDOWN_MARGIN_S = 5.0
"""Over `drain_s`, for closing ports and links."""


class GatewayDeployment:
    """The replica. Without a Router it stays up and healthy, and says that it is not ready."""

    async def __init__(self, config: ClusterConfig, router: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        write_logs(config.logs.format or "text", "gateway")
        listen_on_node_address()
        self._drain_s = config.gateway.drain_s
        model = await asyncio.to_thread(
            ServedModel.load, config.model, config.engine.max_model_len, config.gateway.thinking_close_phrase
        )
        tracing = start_tracing(config.tracing, "gateway")
        self._server = GatewayServer(
            config.gateway, model, _directory_of(router), security=config.security, tracing=tracing
        )
        self._ports = await self._server.start()

    async def ports(self) -> dict[str, int]:
        """Where it listens: grpc, http and metrics."""
        return {"grpc": self._ports.grpc, "http": self._ports.http, "metrics": self._ports.metrics}

    async def info(self) -> bytes:
        """GetServerInfoResponse, for who runs this server: it needs neither a key nor a certificate for it."""
        return (await self._server.core.server_info()).SerializeToString()

    async def drain(self, grace_s: float) -> int:
        """Refuse new requests and let open streams end. Returns how many were cut off after `grace_s`."""
        return await self._server.drain(grace_s)

    async def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        if not self._server.is_draining and not self._server.is_serving:
            raise EngineError("the gateway has stopped serving")

    async def __del__(self) -> None:
        # A constructor that failed has left nothing to drain.
        if hasattr(self, "_server"):
            await self.drain(self._drain_s)


def _directory_of(router: Any) -> CopyDirectory:
    """Asks every replica of the Router's deployment where it listens."""

    async def ask() -> list[str]:
        replies = await router.broadcast("address").results_async(timeout_s=ASK_TIMEOUT_S, return_exceptions=True)
        addresses = [reply for reply in replies if isinstance(reply, str)]
        if not addresses:
            raise NotReady(f"none of {len(replies)} Routers answers ({replies[0]})")
        return addresses

    return ask


def gateway_deployment(config: ClusterConfig, router: serve.Application) -> serve.Application:
    """One gateway per node, on the ports that the config fixes."""
    deployment: Any = serve.deployment(
        name=NAME,
        num_replicas=config.gateway.replicas,
        max_replicas_per_node=1,
        ray_actor_options={"num_cpus": 0, "resources": _node(config)},
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=config.gateway.drain_s + SHUTDOWN_MARGIN_S,
        # Clients' streams do not come through Serve: `__del__` waits for them.
        graceful_shutdown_wait_loop_s=0.1,
    )(GatewayDeployment)
    application: serve.Application = deployment.bind(config, router)
    return application


def _node(config: ClusterConfig) -> dict[str, float]:
    """The Ray resource that puts a gateway where it belongs; in a cluster of several nodes at least on this one."""
    if config.gateway.node_resource is not None:
        return {config.gateway.node_resource: 1}
    if config.router.ray_address is None:
        return {}
    return {f"node:{ray.util.get_node_ip_address()}": 0.001}  # type: ignore[no-untyped-call]  # Ray has no types there
