"""The Ray that mull runs in: one of its own on this machine, or a cluster that exists; and whether it has room.

Imports Ray where it is used: its start costs seconds that a wrong flag need not.
"""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.capacity import check_context, device_with
from cluster.config import ClusterConfig
from cluster.errors import ConfigError, EngineError
from cluster.interrupts import Interrupts
from workers.config import ModelConfig

if TYPE_CHECKING:
    from cluster.ray_node import LeanNode

_PROBE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class RunningRay:
    """What is held of Ray until the end."""

    log_directory: Path
    """On this machine."""
    node: LeanNode | None
    """Our own; None: someone else's. Its guard ends Ray when nobody holds it any more."""

    @property
    def serve_logs(self) -> Path:
        """Of Serve and its replicas."""
        return self.log_directory / "serve"


def start_ray(config: ClusterConfig, interrupts: Interrupts) -> RunningRay:
    """Raises ConfigError where the cluster that is named does not answer, EngineError where ours does not start."""
    # Ray starts workers at nice 15, which would let anything else on the machine delay a step.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if config.router.ray_address is None:
        # Ray replaces a loopback address by one that others can reach, and then listens on all interfaces, except
        # where it is told that a cluster of machines is not wanted. Read when it is imported, here and in its workers.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Other users of this machine must not run code as ours. The token is in our environment, which only we and our
        # processes can read; Ray would write its own to a file.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        return _init_ray(config, interrupts)
    except ConfigError:
        raise
    except Exception as error:  # Ray raises plain ones, such as when the machine is too busy for its start in time
        raise EngineError(f"Ray did not start ({last_line(str(error))}); is /tmp/ray writable?") from error


def start_serve() -> None:
    """Its controller, in the Ray that has been started."""
    from ray import serve
    from ray.serve.config import ProxyLocation

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config={"log_level": "WARNING"})
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _init_ray(config: ClusterConfig, interrupts: Interrupts) -> RunningRay:
    import ray

    if (address := config.router.ray_address) is not None:
        if not config.security.insecure and is_open_to_all(address):
            raise ConfigError(
                f"--ray-address {address}: whoever reaches it can run code as mull; start its nodes with "
                "RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN, or give --insecure where the network is private"
            )
        try:
            with interrupts.held_back():
                context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise ConfigError(
                f"--ray-address {address}: {last_line(str(error))}; run `ray start` on its nodes"
            ) from error
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray has no types there
        check_devices(config, int(resources.get("GPU", 0)))
        return RunningRay(_log_directory(context), None)
    from cluster.ray_node import LeanNode, local_gpus

    # Before the seconds that its start takes.
    check_devices(config, local_gpus())
    # Logical: what the app asks for, so that Serve never waits for cores that a small machine lacks.
    size = config.engine.layout.world_size + 1
    num_cpus = config.router.most_copies * size + 3
    # Nothing of it is for other machines. Serve's controller and the gateway are workers, too.
    node = LeanNode("127.0.0.1", num_cpus, num_workers=config.router.copies * size + 2)
    with interrupts.held_back():
        context = ray.init(address=node.gcs_address, log_to_driver=False, logging_level=logging.ERROR)
    return RunningRay(_log_directory(context), node)


def _log_directory(context: Any) -> Path:
    return Path(context.address_info["session_dir"]) / "logs"


def is_open_to_all(address: str) -> bool:
    """Whether the Ray cluster there answers who shows no token. One that does not answer at all is not."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        # An empty message either way.
        check_alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive", bytes, bytes)
        try:
            check_alive(b"", timeout=_PROBE_TIMEOUT_S)
        except grpc.RpcError as error:
            return error.code() not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE)
    return True


def check_devices(config: ClusterConfig, found: int) -> None:
    """Raises ConfigError where there are fewer GPUs than ranks that need one, or the devices hold no such context."""
    engine, copies = config.engine, config.router.copies
    needed = copies * engine.layout.world_size
    if engine.device == "cuda" and found < needed:
        flags = f"--tp {engine.tp}" + (f" --dp {engine.dp}" if engine.dp > 1 else "")
        flags += f" --copies {copies}" if copies > 1 else ""
        raise ConfigError(f"--device cuda needs {needed} GPUs for {flags}, found {found}; lower them")
    check_context(config, ModelConfig.from_dir(config.model.path), device_with(config, found))


def check_nodes(config: ClusterConfig) -> None:
    """Raises ConfigError where a cluster of someone else's is too small: Serve would wait for it to grow."""
    import ray

    from cluster.router.launchers import ranks_per_bundle

    layout, copies = config.engine.layout, config.router.copies
    together, num_ranks = ranks_per_bundle(layout), copies * layout.world_size
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray has no types there
    cpus = sorted((int(resources.get("CPU", 0)) for resources in alive), reverse=True)
    if sum(cpus) < num_ranks + copies or sum(cpu // together * together for cpu in cpus) < num_ranks:
        raise ConfigError(
            f"{num_ranks} ranks, {together} of them on a node at a time, and the Router need a CPU each; the nodes of "
            f"the Ray cluster have {', '.join(map(str, cpus))}; lower --tp, --dp or --copies, or start Ray with more"
        )


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
