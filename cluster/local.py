"""LocalCluster: Ray, the Serve app and its end on this one machine; what `mull serve` and `mull demo` stand on.

Owns every process that it starts: on any way out, Ctrl-C and errors included, they are stopped.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from cluster.config import ClusterConfig
from cluster.errors import ConfigError, EngineError
from cluster.interrupts import Interrupts
from cluster.log_follower import LogFollower
from cluster.ports import HeldPorts
from cluster.ray_cluster import RunningRay, check_nodes, last_line, start_ray, start_serve
from mull.v1 import generation_pb2 as pb

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_KILL_POLL_S = 0.01
_CALL_TIMEOUT_S = 10.0
_STOP_MARGIN_S = 10.0
_SILENCE_S = 60.0
_CUT_S = 10.0


@dataclass(frozen=True)
class Addresses:
    """Where clients and Prometheus connect to."""

    grpc: str
    http: str
    metrics: str


class LocalCluster:
    """Use as a context manager: everything is stopped at its end.

    `start` returns when the gateway listens; the ranks load meanwhile, and `wait_until_ready` tells how far they are.
    """

    def __init__(self, config: ClusterConfig, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._ports = HeldPorts()
        self._config = _with_fixed_ports(config, self._ports)
        self._gateway: Any = None
        self._logs: LogFollower | None = None
        self._ray: RunningRay | None = None
        self._ray_was_started = False
        self._app_was_started = False
        self._last_answer_s = time.monotonic()
        self._reasons: set[str] = set()
        """Why copies that were ready are not, as far as it was told."""

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> Addresses:
        """Start Ray and the app. Raises ConfigError where GPUs are missing, EngineError where something fails."""
        self._interrupts.check()
        self._ray_was_started = True
        self._ray = start_ray(self._config, self._interrupts)
        start_serve()
        if self._config.logs.format is not None and self._config.router.ray_address is None:
            self._logs = LogFollower(self._ray.log_directory, self._config.logs.format)
            self._logs.start()
        check_nodes(self._config)
        self._interrupts.check()
        self._app_was_started = True
        self._gateway = _run_app(self._config, self._ray.serve_logs)
        self._interrupts.check()
        gateway = self._config.gateway
        address = f"{gateway.host}:{gateway.grpc_port}"
        scheme = "http" if self._config.security.tls is None else "https"
        return Addresses(
            grpc=address,
            http=f"{scheme}://{_in_url(gateway.host)}:{gateway.http_port}",
            metrics=f"http://{_in_url(gateway.metrics_host)}:{gateway.metrics_port}/metrics",
        )

    def info(self) -> pb.GetServerInfoResponse:
        """What the gateway says of itself and of its Router. Raises RayError or TimeoutError where it is away."""
        assert self._gateway is not None, "start() comes first"
        # Not over its port: that asks for a key and perhaps a certificate, which are the clients'.
        return pb.GetServerInfoResponse.FromString(self._gateway.info.remote().result(timeout_s=_CALL_TIMEOUT_S))

    def router_metrics(self) -> list[str]:
        """Where Prometheus finds the Routers' own figures."""
        return [f"http://{router.metrics_address}/metrics" for router in self.info().routers if router.metrics_address]

    def wait_until_ready(self, progress: Callable[[int, int], None]) -> None:
        """Wait until the ranks can take work; `progress` gets bytes loaded and bytes in all.

        Raises EngineError with the rank's own line when they cannot, or when `start_timeout_s` has passed.
        """
        deadline_s = time.monotonic() + self._config.router.start_timeout_s + _STOP_MARGIN_S
        while time.monotonic() < deadline_s:
            self._interrupts.check()
            info = self.info()
            progress(sum(it.loaded_bytes for it in info.routers), sum(it.total_bytes for it in info.routers))
            for router in info.routers:
                if router.failed:
                    raise EngineError(router.reason)
            if sum(router.ready for router in info.routers) >= self._config.router.copies:
                return
            time.sleep(_POLL_S)
        raise EngineError(f"not ready within {self._config.router.start_timeout_s:g} s: {info.reason}")

    def check(self) -> None:
        """Raise EngineError when every Router has given up, the gateway has been silent for long, or our Ray has ended.

        A gateway that died is not the end: Serve starts it again, on the same ports.
        """
        from ray.exceptions import RayError

        assert self._ray is not None, "start() comes first"
        # Nothing that runs on it could be started again.
        if self._ray.node is not None and (ended := self._ray.node.ended):
            raise EngineError(f"{', '.join(ended)} of Ray has ended; see {self._ray.log_directory}, and start again")
        try:
            info = self.info()
        except (RayError, TimeoutError) as error:
            silent_s = time.monotonic() - self._last_answer_s
            if silent_s > _SILENCE_S:
                raise EngineError(
                    f"the gateway has not answered for {silent_s:.0f} s; see {self._ray.serve_logs}"
                ) from error
            return
        self._last_answer_s = time.monotonic()
        if info.routers and all(router.failed for router in info.routers):
            raise EngineError("; ".join(router.reason for router in info.routers))
        self._tell_changes({router.reason for router in info.routers if not router.ready})

    def _tell_changes(self, reasons: set[str]) -> None:
        """What became of the copies since it was told last."""
        for reason in sorted(reasons - self._reasons):
            logger.warning("a copy of the model is not ready: %s", reason)
        if self._reasons and not reasons:
            logger.warning("all copies of the model are ready again")
        self._reasons = reasons

    def drain(self, tell: Callable[[str], object]) -> int:
        """Refuse new work and let running streams end, for at most `drain_s`. Returns how many were cut off.

        Tells when an interrupt would raise KeyboardInterrupt at once, with streams told that they are cut. Raises
        EngineError when the gateway does not say so in time.
        """
        from ray.exceptions import RayError

        grace_s = self._config.gateway.drain_s
        with self._interrupts.at_once():
            try:
                tell(f"draining, at most {grace_s:g} s; Ctrl-C again stops at once")
                cut: int = self._gateway.drain.remote(grace_s).result(timeout_s=grace_s + _STOP_MARGIN_S)
            except KeyboardInterrupt:
                self._cut_streams()
                raise
            except (RayError, TimeoutError) as error:
                raise EngineError(
                    f"the gateway was lost while draining ({last_line(str(error))}); streams may be cut"
                ) from error
        return cut

    def _cut_streams(self) -> None:
        """Let clients be told that the server goes, rather than see their connection break."""
        from ray.exceptions import RayError

        try:
            self._gateway.drain.remote(0).result(timeout_s=_CUT_S)
        except (RayError, TimeoutError) as error:
            logger.warning("streams could not be ended in order: %s", last_line(str(error)))

    def stop(self) -> None:
        """Stop the app and Ray, with all their processes."""
        if self._ray_was_started:
            import ray

            if self._app_was_started and self._config.router.ray_address is not None:
                _delete_app()
            ray.shutdown()
            # The gateway has drained: nothing is left that Serve or Ray would have to end gracefully.
            _end_children()
        if self._logs is not None:
            self._logs.stop()
        self._ports.close()
        self._gateway = self._logs = None
        self._ray = None
        self._ray_was_started = self._app_was_started = False


def _delete_app() -> None:
    """The Ray cluster is not ours and stays; what runs in it for us must not."""
    from ray import serve
    from ray.exceptions import RayError

    from cluster.app import APP_NAME

    try:
        serve.delete(APP_NAME)
    except (RuntimeError, RayError) as error:
        raise EngineError(f"the app could not be deleted from the Ray cluster ({last_line(str(error))})") from error


def _end_children() -> None:
    """All of Ray's processes, and theirs."""
    children: set[psutil.Process] = set()
    # Stopped first: one that still ran could start another, which we would not know of.
    while started := set(psutil.Process().children(recursive=True)) - children:
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.suspend()
        children |= started
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    deadline_s = time.monotonic() + _STOP_MARGIN_S
    while alive := [child.pid for child in children if _is_alive(child)]:
        if time.monotonic() > deadline_s:
            logger.warning("processes %s were killed %g s ago and have not ended", alive, _STOP_MARGIN_S)
            return
        time.sleep(_KILL_POLL_S)


def _is_alive(process: psutil.Process) -> bool:
    """One that is dead may be a zombie for as long as it pleases whoever has inherited it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _with_fixed_ports(config: ClusterConfig, ports: HeldPorts) -> ClusterConfig:
    """Port 0 becomes a free one here and now, so that a gateway that Serve starts again has the same."""
    gateway = config.gateway
    fixed = {
        "grpc_port": _hold(ports, "--grpc-port", gateway.host, gateway.grpc_port),
        "http_port": _hold(ports, "--http-port", gateway.host, gateway.http_port),
        "metrics_port": _hold(ports, "--metrics-port", gateway.metrics_host, gateway.metrics_port),
    }
    if config.router.metrics_port and config.router.ray_address is None:
        for port in config.router.metrics_ports:
            _hold(ports, "--router-metrics-port", gateway.metrics_host, port)
    return config.model_copy(update={"gateway": gateway.model_copy(update=fixed)})


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _hold(ports: HeldPorts, flag: str, host: str, port: int) -> int:
    """Raises ConfigError where the port cannot be had."""
    try:
        return ports.hold(host, port)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"{flag} {port}: {reason} on {host}; choose another, or 0 for a free one") from error


def _run_app(config: ClusterConfig, logs: Path) -> Any:
    from ray import serve
    from ray.exceptions import RayError

    from cluster.app import APP_NAME, build_app

    try:
        return serve.run(build_app(config), name=APP_NAME, route_prefix=None)
    except (RuntimeError, RayError) as error:
        raise EngineError(
            f"the app did not start ({_replicas_words() or last_line(str(error))}); see {logs}"
        ) from error


def _replicas_words() -> str:
    """What a replica that could not start said last; empty where none has said anything, or nobody can be asked."""
    from ray import serve
    from ray.exceptions import RayError

    from cluster.app import APP_NAME

    try:
        application = serve.status().applications.get(APP_NAME)
    except (RuntimeError, RayError) as error:
        logger.warning("Serve cannot be asked what went wrong: %s", last_line(str(error)))
        return ""
    deployments = application.deployments.values() if application is not None else ()
    return next((last_line(said.message) for said in deployments if "Error" in said.message), "")
