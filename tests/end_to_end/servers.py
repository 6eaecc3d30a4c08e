"""A real `mull serve` in a process of its own: started on free ports, found by its ready line, always ended."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0

MULL = (sys.executable, "-m", "cluster.cli")
FREE_PORTS = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0", "--router-metrics-port", "0")


@dataclass
class Server:
    """A running `mull serve`."""

    process: subprocess.Popen[str]
    address: str
    http_url: str
    metrics_url: str
    router_metrics_url: str
    lines: list[str] = field(default_factory=list)

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """Signal its whole process group, as a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, number)

    def wait(self) -> int:
        return self.process.wait(STOP_TIMEOUT_S)


def mull(*args: str, stdin: str | None = None, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run one `mull` command to its end."""
    return subprocess.run([*MULL, *args], input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)


@contextmanager
def starting(*flags: str) -> Iterator[subprocess.Popen[str]]:
    """`mull serve` on free ports, just started. On exit it is interrupted, and killed when it does not end in time."""
    command = [*MULL, "serve", *FREE_PORTS, *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        assert process.stdout is not None
        process.stdout.close()


@contextmanager
def serving(*flags: str) -> Iterator[Server]:
    """The same, ready."""
    with starting(*flags) as process:
        yield when_ready(process)


def when_ready(process: subprocess.Popen[str]) -> Server:
    lines: list[str] = []
    ready: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("ready"):
                ready.put(line)
        ready.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        line = ready.get(timeout=START_TIMEOUT_S)
    except queue.Empty:
        raise AssertionError(f"no ready line within {START_TIMEOUT_S:g} s; it printed:\n" + "\n".join(lines)) from None
    if line is None:
        raise AssertionError(f"mull serve ended with {process.wait(STOP_TIMEOUT_S)}:\n" + "\n".join(lines))
    found = re.search(r"grpc (\S+) · http (\S+) · metrics (\S+) (\S+)", line)
    assert found is not None, line
    return Server(process, found[1], found[2], found[3], found[4], lines)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)
