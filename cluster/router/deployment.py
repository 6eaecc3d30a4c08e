"""The Router as a Serve deployment: one replica is one copy of the model, its ranks in the replica's placement group.

Hop 4's address is found here. Serve starts, watches and restarts the replica; no request passes through Serve.
"""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import grpc
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.capacity import device_with
from cluster.config import ClusterConfig, SecurityConfig, is_loopback_host
from cluster.errors import ConfigError, EngineError
from cluster.router.assembly import make_router
from cluster.router.autoscaling import KV_USED, SLOTS_USED, scale_copies
from cluster.router.launchers import RayLauncher, ranks_per_bundle, worker_environment
from cluster.router.router import RouterStats
from cluster.router.sequence_spans import SequenceSpans
from cluster.serve_ports import listen_on_node_address
from cluster.tls import link_server_credentials
from cluster.tracing import start_tracing
from workers.config import Device
from workers.logs import write_logs

NAME = "Router"
STOP_TIMEOUT_S = 25.0
"""Over `drain_s`: the bounds on stopping ranks, with room."""
HEALTH_PERIOD_S = 2.0


def resolve_device(config: ClusterConfig) -> Device:
    """In the Ray cluster that we are in. Raises ConfigError."""
    resources: dict[str, float] = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]  # Ray has no types there
    return device_with(config, int(resources.get("GPU", 0)))


class RouterDeployment:
    """The replica. Its constructor returns while the ranks load: Describe tells how far they are, or what is wrong."""

    async def __init__(self, config: ClusterConfig, device: Device) -> None:  # type: ignore[misc]  # Serve awaits it
        log_format = config.logs.format or "text"
        write_logs(log_format, "router")
        listen_on_node_address()
        launcher = RayLauncher(log_format)
        self._host = launcher.host
        self._drain_s = config.router.drain_s
        self._num_slots = config.engine.max_num_seqs * config.engine.dp
        self._tracing = start_tracing(config.tracing, "router")
        spans = [] if self._tracing is None else [SequenceSpans(self._tracing)]
        self._router = make_router(config, device, launcher, spans)
        await self._router.start(self._host, 0, link_credentials(config.security, self._host))
        self._router.open_metrics(
            metrics_host(config, self._host), config.router.metrics_ports, config.security.link_tls
        )
        # What was imported stays: to look through it for garbage would hold up all streams for 0.1 s now and then.
        gc.freeze()

    async def address(self) -> str:
        """host:port of RouterService."""
        return self._router.address

    async def stats(self) -> RouterStats:
        return self._router.stats()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """How full this copy is: what Serve hands to the policy that says how many there should be."""
        scheduler = self._router.stats().scheduler
        if scheduler is None or not self._router.is_ready:
            return {}
        return {
            SLOTS_USED: (scheduler.num_running + scheduler.num_waiting) / self._num_slots,
            KV_USED: 1 - scheduler.num_free_blocks / scheduler.num_blocks,
        }

    async def check_health(self) -> None:
        """Raises when the engine has given up, or does not move: Serve then starts the replica again."""
        if (reason := self._router.why_not_live) is not None:
            raise EngineError(reason)

    async def __del__(self) -> None:
        # A constructor that failed has left nothing to stop.
        if hasattr(self, "_router"):
            await self._router.stop(self._drain_s)
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)


def metrics_host(config: ClusterConfig, node_host: str) -> str:
    """As the gateways', but that one which others can reach is the node's own where there are several."""
    host = config.gateway.metrics_host
    return host if config.router.ray_address is None or is_loopback_host(host) else node_host


def link_credentials(security: SecurityConfig, host: str) -> grpc.ServerCredentials | None:
    """None: plain text. Raises ConfigError where that would leave the machine, and nobody has asked for it."""
    if security.link_tls is not None:
        return link_server_credentials(security.link_tls)
    if not security.insecure and not is_loopback_host(host):
        raise ConfigError(
            f"the Router would listen on {host} in plain text; give security.link_cert, link_key and link_ca, or "
            "insecure: true where the network is private"
        )
    return None


def autoscaling_options(config: ClusterConfig) -> dict[str, Any]:
    """How many replicas Serve is to run."""
    router = config.router
    if router.max_copies is None:
        return {"num_replicas": router.copies}
    scaling = AutoscalingConfig(
        min_replicas=router.copies,
        initial_replicas=router.copies,
        max_replicas=router.max_copies,
        upscale_delay_s=router.upscale_delay_s,
        downscale_delay_s=router.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function=scale_copies),  # type: ignore[no-untyped-call]  # Ray has no types there
    )
    return {"autoscaling_config": scaling}


def router_deployment(config: ClusterConfig) -> serve.Application:
    """A Router for each copy, with a bundle for itself and one for each set of ranks that must share a node."""
    device, layout = resolve_device(config), config.engine.layout
    size = ranks_per_bundle(layout)
    bundle: dict[str, float] = {"CPU": size, "GPU": size} if device == "cuda" else {"CPU": size}
    deployment: Any = serve.deployment(
        name=NAME,
        **autoscaling_options(config),
        ray_actor_options={"num_cpus": 1, "runtime_env": worker_environment()},
        placement_group_bundles=[{"CPU": 1}, *[bundle] * (layout.world_size // size)],
        placement_group_strategy="PACK",
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=config.router.drain_s + STOP_TIMEOUT_S,
        # No request comes through Serve, so there is nothing to wait for.
        graceful_shutdown_wait_loop_s=0.1,
    )(RouterDeployment)
    application: serve.Application = deployment.bind(config, device)
    return application
