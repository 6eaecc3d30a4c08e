"""Ray on this one machine: the processes that mull needs, and no others.

`ray.init` also starts the dashboard's server (though told not to, and waits for it), the autoscaler's monitor, a log
monitor and two agents, which the first worker waits for: five Python processes that nothing here asks. And each of its
workers imports Ray twice: first in a script that then becomes the worker. Ray has no public way to leave these out;
this is written for the Ray that constraints.txt pins.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from ray._private import services
from ray._private.accelerators import NvidiaGPUAcceleratorManager
from ray._private.node import Node
from ray._private.parameter import RayParams

from cluster.config import is_loopback_host
from cluster.orphan_guard import NODE_MARK

_WORKER_SETUP = Path(__file__).with_name("ray_worker_setup.py")
_GUARD = Path(__file__).with_name("orphan_guard.py")
_AGENT = Path(__file__).with_name("ray_agent.py")
_AGENT_PORTS = {
    "--dashboard_agent_command": ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port"),
    "--runtime_env_agent_command": ("runtime_env_agent_port",),
}


class LeanNode(Node):
    """Started by its making. Its processes are children of this one, and end with it however it ends."""

    def __init__(
        self, host: str, num_cpus: int, resources: dict[str, float] | None = None, *, num_workers: int
    ) -> None:
        """`num_workers` are started before anybody asks for them."""
        self._num_workers = num_workers
        # Others can join a node at another address, with workers that ask for environments: one agent makes them.
        alone = is_loopback_host(host)
        self._replaced = set(_AGENT_PORTS) if alone else {"--dashboard_agent_command"}
        params = RayParams(
            node_ip_address=host,
            num_cpus=num_cpus,
            resources=resources,
            no_monitor=True,
            include_log_monitor=False,  # type: ignore[arg-type]  # a bool in truth
            setup_worker_path=str(_WORKER_SETUP),
            # By default one that another Ray on this machine has: the agent would try again for seconds.
            dashboard_agent_listen_port=0,
        )
        self._guard = _start_guard()
        super().__init__(params, head=True, shutdown_at_exit=False)
        assert self._guard.stdin is not None, "its pipe is ours"
        self._guard.stdin.write(f"{self._session}/".encode())
        self._guard.stdin.flush()

    def stop(self) -> None:
        """For who goes on after it; who ends need not call it."""
        self._guard.kill()
        self._guard.communicate()
        del os.environ[NODE_MARK]
        self.kill_all_processes(check_alive=False, allow_graceful=True)

    @property
    def ended(self) -> list[str]:
        """Processes of its own that have: names of Ray's, as "raylet"."""
        return [name for name, _ in self.dead_processes()]  # type: ignore[no-untyped-call]  # Ray has no types there

    def start_raylet(self, *args: Any, **options: Any) -> None:
        """With other options than its own."""
        start = services.start_ray_process

        def start_lean(command: list[str], *rest: Any, **more: Any) -> object:
            return start([self._lean(option) for option in command], *rest, **more)

        services.start_ray_process = start_lean
        try:
            super().start_raylet(*args, **options)
        finally:
            services.start_ray_process = start

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        """Nobody looks at it."""

    @property
    def _session(self) -> str:
        directory: str = self.get_session_dir_path()  # type: ignore[no-untyped-call]  # Ray has no types there
        return directory

    def _lean(self, option: str) -> str:
        """One of the raylet's options, as it is to be."""
        name, _, _ = option.partition("=")
        if name == "--num_prestart_python_workers":
            return f"{name}={self._num_workers}"
        if name not in self._replaced:
            return option
        command = [sys.executable, "-I", "-S", str(_AGENT), self._session, *_AGENT_PORTS[name]]
        return f"{name}={subprocess.list2cmdline(command)}"


def local_gpus() -> int:
    """As many as Ray will find here, by its own count."""
    count: int = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    return count if visible is None else min(count, len(visible))


def _start_guard() -> subprocess.Popen[bytes]:
    """Everything that is started from here on is killed when this process ends, however that happens."""
    value = f"{os.getpid()}-{secrets.token_hex(8)}"
    # Without the mark in its own environment.
    command = [sys.executable, "-I", "-S", str(_GUARD), f"{NODE_MARK}={value}"]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    os.environ[NODE_MARK] = value
    return guard
