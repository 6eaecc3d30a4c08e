"""LocalCluster: Ray, the Serve app and its end on this one machine; what `mull serve` and `mull demo` stand on.

Owns every process that it starts: on any way out, Ctrl-C and errors included, they are stopped.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
import psutil

from cluster.config import ClusterConfig
from cluster.errors import ConfigError, EngineError
from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceStub

_POLL_S = 0.2
_CALL_TIMEOUT_S = 10.0
_STOP_MARGIN_S = 10.0
_RAY_LOGS = "/tmp/ray/session_latest/logs/serve"


@dataclass(frozen=True)
class Addresses:
    """Where clients and Prometheus connect to."""

    grpc: str
    metrics: str


class LocalCluster:
    """Use as a context manager: everything is stopped at its end.

    `start` returns when the gateway listens; the ranks load meanwhile, and `wait_until_ready` tells how far they are.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._gateway: Any = None
        self._addresses: Addresses | None = None
        self._channel: grpc.Channel | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Addresses:
        """Start Ray and the app. Raises ConfigError when a port is taken."""
        gateway = self._config.gateway
        for flag, port in (("--grpc-port", gateway.grpc_port), ("--metrics-port", gateway.metrics_port)):
            _check_free(flag, gateway.host, port)
        _start_ray(self._config)
        from ray import serve

        from cluster.app import APP_NAME, build_app

        self._guard = _guard_children()
        try:
            self._gateway = serve.run(build_app(self._config), name=APP_NAME, route_prefix=None)
        except RuntimeError as error:
            raise EngineError(f"the app did not start; the reason is in {_RAY_LOGS}: {_last_line(error)}") from error
        ports = self._gateway.ports.remote().result(timeout_s=_CALL_TIMEOUT_S)
        self._addresses = Addresses(
            grpc=f"{gateway.host}:{ports['grpc']}", metrics=f"http://{gateway.host}:{ports['metrics']}/metrics"
        )
        self._channel = grpc.insecure_channel(self._addresses.grpc)
        return self._addresses

    def info(self) -> pb.GetServerInfoResponse:
        """What the gateway says of itself and of its Router."""
        assert self._channel is not None, "start() comes first"
        return GenerationServiceStub(self._channel).GetServerInfo(
            pb.GetServerInfoRequest(), timeout=_CALL_TIMEOUT_S, wait_for_ready=True
        )

    def wait_until_ready(self, progress: Callable[[int, int], None]) -> None:
        """Wait until the ranks can take work; `progress` gets bytes loaded and bytes in all.

        Raises EngineError with the rank's own line when they cannot, or when `start_timeout_s` has passed.
        """
        deadline_s = time.monotonic() + self._config.router.start_timeout_s + _STOP_MARGIN_S
        while time.monotonic() < deadline_s:
            info = self.info()
            for router in info.routers:
                progress(router.loaded_bytes, router.total_bytes)
                if router.failed:
                    raise EngineError(router.reason)
            if info.ready:
                return
            time.sleep(_POLL_S)
        raise EngineError(f"not ready within {self._config.router.start_timeout_s:g} s: {info.reason}")

    def check(self) -> None:
        """Raise EngineError when the Router has given up."""
        for router in self.info().routers:
            if router.failed:
                raise EngineError(router.reason)

    def drain(self) -> int:
        """Refuse new work and let running streams end, for at most `drain_s`. Returns how many were cut off."""
        if self._gateway is None:
            return 0
        grace_s = self._config.gateway.drain_s
        cut: int = self._gateway.drain.remote(grace_s).result(timeout_s=grace_s + _STOP_MARGIN_S)
        return cut

    def stop(self) -> None:
        """Stop the app and Ray, with all their processes."""
        import ray

        if self._channel is not None:
            self._channel.close()
        # The gateway has drained: nothing is left that Serve would have to shut down gracefully.
        ray.shutdown()
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
        self._gateway = self._channel = self._guard = None


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _check_free(flag: str, host: str, port: int) -> None:
    if port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{flag} {port}: {error.strerror} on {host}; choose another, or 0 for a free one"
            ) from error


def _guard_children() -> subprocess.Popen[bytes]:
    """A process that waits for our end and then kills Ray's daemons.

    After a `kill -9` of ours, ranks and replicas end within seconds, but Ray's agents try for a minute to report it.
    """
    pids = [str(child.pid) for child in psutil.Process().children(recursive=True)]
    # The shell reads a pipe whose other end is ours alone: it closes when we end, however that happens.
    script = "cat >/dev/null; kill -9 " + " ".join(pids) + " 2>/dev/null"
    return subprocess.Popen(["/bin/sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True)


def _start_ray(config: ClusterConfig) -> None:
    # Ray starts workers at nice 15, which would let anything else on the machine delay a step.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve
    from ray.serve.config import ProxyLocation

    ray.init(
        address="local",
        # Nothing of it is for other machines.
        _node_ip_address="127.0.0.1",
        # Logical: what the app asks for, so that Serve never waits for cores that a small machine lacks.
        num_cpus=config.engine.tp + 4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config={"log_level": "WARNING"})
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
