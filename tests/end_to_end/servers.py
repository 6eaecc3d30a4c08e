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
from dataclasses import dataclass

import psutil

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 120.0
WAIT_S = 60.0

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
    lines: list[str]
    """What it has written so far."""
    reader: threading.Thread
    """Reads them, to the end."""

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """Signal its whole process group, as a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, number)

    def wait(self) -> int:
        """Its exit status, once all that it wrote is in `lines`."""
        status = self.process.wait(STOP_TIMEOUT_S)
        self.reader.join(STOP_TIMEOUT_S)
        assert not self.reader.is_alive(), f"{STOP_TIMEOUT_S:g} s after its end somebody still holds its output"
        return status


def mull(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run one `mull` command to its end."""
    return subprocess.run(
        [*MULL, *args], input=stdin, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )


def told(*args: str) -> str:
    """What a `mull` command that succeeds prints."""
    done = mull(*args)
    assert done.returncode == 0, f"mull {' '.join(args)} gave {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


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
            print("server:", line, end="")  # where a test fails, pytest shows it
            if line.startswith("ready"):
                ready.put(line)
        ready.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        line = ready.get(timeout=START_TIMEOUT_S)
    except queue.Empty:
        raise AssertionError(f"no ready line within {START_TIMEOUT_S:g} s; it printed:\n" + "\n".join(lines)) from None
    if line is None:
        raise AssertionError(f"mull serve ended with {process.wait(STOP_TIMEOUT_S)}:\n" + "\n".join(lines))
    found = re.search(r"grpc (\S+) · http (\S+) · metrics (\S+) (\S+)", line)
    assert found is not None, line
    return Server(process, found[1], found[2], found[3], found[4], lines, reader)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def command_of(process: psutil.Process) -> str:
    """Its name and its words; empty where it has ended, as some of Ray's do at any time."""
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.NoSuchProcess:
        return ""


def named(server: Server, *words: str) -> list[psutil.Process]:
    """Of a server's processes those with all of these words in their commands."""
    return [process for process in descendants(server.process) if all(word in command_of(process) for word in words)]


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {WAIT_S:g} s for {what}"
        time.sleep(0.02)
