"""Ray on this one machine: the processes that mull needs, and no others.

`ray.init` also starts the dashboard's server (though told not to, and waits for it), the autoscaler's monitor and a log
monitor: three Python processes that nothing here asks. And each of its workers imports Ray twice: first in a script
that then becomes the worker. Ray has no public way to leave these out; this is written for the Ray that
constraints.txt pins.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

from ray._private.accelerators import NvidiaGPUAcceleratorManager
from ray._private.node import Node
from ray._private.parameter import RayParams

_WORKER_SETUP = Path(__file__).with_name("ray_worker_setup.py")
_MARK = "MULL_NODE"
"""The variable in the environment of all processes of a node."""
_GUARD = Path(__file__).with_name("orphan_guard.py")


class LeanNode(Node):
    """Started by its making. Its processes are children of this one, and end with it however it ends."""

    def __init__(self, host: str, num_cpus: int, resources: dict[str, float] | None = None) -> None:
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
        session: str = self.get_session_dir_path()  # type: ignore[no-untyped-call]  # Ray has no types there
        self._guard.stdin.write(f"{session}/".encode())
        self._guard.stdin.flush()

    def stop(self) -> None:
        """For who goes on after it; who ends need not call it."""
        self._guard.kill()
        self._guard.communicate()
        del os.environ[_MARK]
        self.kill_all_processes(check_alive=False, allow_graceful=True)

    def start_ray_processes(self) -> None:
        super().start_ray_processes()  # type: ignore[no-untyped-call]  # Ray has no types there
        # It takes a second, and so do the processes, for which our caller waits: both at once.
        import ray.serve  # noqa: F401  # for whoever imports it next

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        """Nobody looks at it."""


def local_gpus() -> int:
    """As many as Ray will find here, by its own count."""
    count: int = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    return count if visible is None else min(count, len(visible))


def _start_guard() -> subprocess.Popen[bytes]:
    """Everything that is started from here on is killed when this process ends, however that happens."""
    value = f"{os.getpid()}-{secrets.token_hex(8)}"
    # Without the mark in its own environment.
    command = [sys.executable, "-I", "-S", str(_GUARD), f"{_MARK}={value}"]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    os.environ[_MARK] = value
    return guard
