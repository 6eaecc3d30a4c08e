"""Machines of our own: network namespaces joined by a veth pair, each a node of one Ray cluster.

A host has its own network, name, /tmp, shared memory and processes; all of it ends with its first process.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.end_to_end.servers import MULL, Server, when_ready

RAY_PORT = 6379
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
# Nothing here asks what is left out.
_HEAD = ("--head", f"--port={RAY_PORT}", "--include-dashboard=false", "--no-monitor")
_NODE = ("--object-store-memory=80000000", "--include-log-monitor=false")
_NAMESPACES = ("--net", "--uts", "--mount", "--pid")
_INIT = """
set -e
tmp=$(mktemp -d)
mount -t tmpfs tmpfs "$tmp"
case {checkout} in /tmp/*)
    mkdir -p "$tmp"/{below_tmp}
    mount --bind {checkout} "$tmp"/{below_tmp}
esac
mount --move "$tmp" /tmp
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
hostname {name}
echo up
exec sleep infinity
"""
"""Its own /tmp, in which a checkout that lies below /tmp is still to be seen."""
CHECKOUT = Path(__file__).parents[2]


def why_impossible() -> str | None:
    """Why this machine cannot have such hosts; None: it can."""
    for command in (
        ["ip", "-Version"],
        ["nsenter", "--version"],
        ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "ip", "link", "add", "probe", "type", "veth"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except FileNotFoundError:
            return f"{command[0]} is missing"
        if done.returncode:
            return f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}"
    return None


@dataclass(frozen=True)
class Host:
    """One of them, by the process that holds its namespaces."""

    name: str
    address: str
    pid: int
    environment: dict[str, str]

    def command(self, *words: str) -> list[str]:
        """A command that runs on it."""
        return ["nsenter", "--target", str(self.pid), *_NAMESPACES, *words]

    def attempt(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run to the end, whatever that is."""
        command = self.command(*words)
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
        )

    def run(self, *words: str) -> str:
        """Run to the end. Returns what it printed; raises AssertionError with its errors where it fails."""
        done = self.attempt(*words)
        assert done.returncode == 0, f"{words} on {self.name} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def processes(self) -> str:
        """The command lines of all that runs on it."""
        listing = "import psutil; print(*(p.info['cmdline'] for p in psutil.process_iter(['cmdline'])), sep='\\n')"
        return self.run(sys.executable, "-c", listing)

    @contextmanager
    def serving(self, *flags: str) -> Iterator[Server]:
        """`mull serve` on it, ready; interrupted at the end."""
        words = self.command(*MULL, "serve", *flags)
        process = subprocess.Popen(
            words, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            yield when_ready(process)
            _interrupt_child(process)
            process.wait(STOP_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _interrupt_child(process: subprocess.Popen[str]) -> None:
    """nsenter stays outside of the pid namespace, waits for its child, and passes no signal on."""
    for child in psutil.Process(process.pid).children():
        child.send_signal(signal.SIGINT)


@contextmanager
def ray_hosts(cpus: dict[str, int]) -> Iterator[list[Host]]:
    """Hosts of these names, joined, each a node of one Ray cluster with so many CPUs; the first is its head."""
    # A token of our own: Ray would else look for one that this machine may have, and so guard only some of the nodes.
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    with ExitStack() as stack:
        hosts = [
            stack.enter_context(_host(name, f"10.77.0.{index + 1}", environment)) for index, name in enumerate(cpus)
        ]
        _join(hosts)
        head = hosts[0]
        for host in hosts:
            role = _HEAD if host is head else (f"--address={head.address}:{RAY_PORT}",)
            own = (f"--node-ip-address={host.address}", f"--num-cpus={cpus[host.name]}")
            host.run(sys.executable, "-m", "ray.scripts.scripts", "start", *role, *own, *_NODE)
        yield hosts


@contextmanager
def _host(name: str, address: str, environment: dict[str, str]) -> Iterator[Host]:
    checkout = str(CHECKOUT)
    init = _INIT.format(
        name=name, checkout=shlex.quote(checkout), below_tmp=shlex.quote(checkout.removeprefix("/tmp/"))
    )
    command = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", init]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    late = threading.Timer(START_TIMEOUT_S, process.kill)
    late.start()
    try:
        assert process.stdout.readline() == "up\n", f"{name} did not come up within {START_TIMEOUT_S:g} s"
        late.cancel()  # it may live for longer than it may take to come up
        (first,) = psutil.Process(process.pid).children()
        yield Host(name, address, first.pid, environment)
    finally:
        late.cancel()
        process.kill()
        process.wait(STOP_TIMEOUT_S)
        process.stdout.close()


def _join(hosts: list[Host]) -> None:
    """A veth pair between two hosts: each one's only way out."""
    one, other = (str(host.pid) for host in hosts)
    link = ["ip", "link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", other]
    subprocess.run(link, check=True, timeout=30)
    for host in hosts:
        host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
