"""An engine's process as the harness holds it: asked, timed, stopped while others are measured, and weighed."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.peers.protocol import EngineFailed, LoadJob, RunJob, RunReply, read_message, write_line

ROOT = Path(__file__).parents[2]
GRACE_S = 60.0
"""Past a run's bound: a step that is under way ends first."""
STOP_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Memory:
    """Of an engine's processes: shared pages counted once (PSS)."""

    total_mb: float
    largest_process_mb: float
    num_processes: int


class EngineProcess:
    """Starts in the constructor; `load` comes first."""

    def __init__(self, python: Path, module: str, environment: Mapping[str, str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._root: int | None = None
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [python, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env=os.environ | environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"},
                cwd=ROOT,
                # Ctrl-C is ours to pass on.
                process_group=0,
            )
        assert self._process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def load(self, job: LoadJob, timeout_s: float) -> None:
        self._root = int(self._ask({"load": asdict(job)}, "loaded", timeout_s)["pid"])

    def run(self, job: RunJob) -> RunReply:
        return RunReply(**self._ask({"run": asdict(job)}, "ran", job.bound_s + GRACE_S))

    def _ask(self, message: dict[str, Any], kind: str, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the answer, which is none, says why
            write_line(self._process.stdin, message)
        if not self._selector.select(timeout_s):
            raise EngineFailed(f"no answer within {timeout_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise EngineFailed(f"its process ended with {self._process.wait(STOP_TIMEOUT_S)}: {self._last_words()}")
        return read_message(line, kind)

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else f"{self._log} is empty"

    def pause(self) -> None:
        """Stop all its processes where they are: threads that poll would take time from the others."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _family(self) -> list[psutil.Process]:
        """Our process and all below it."""
        try:
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def memory(self) -> Memory:
        """Of the processes that serve: with a client in our process, those of the server alone."""
        assert self._root is not None, "load comes first"
        root = psutil.Process(self._root)
        sizes = [pss_mb(process.pid) for process in [root, *root.children(recursive=True)]]
        return Memory(sum(sizes), max(sizes), len(sizes))

    def idle_cpu(self, seconds: float) -> float:
        """Share of a core that it takes while nobody asks it for anything."""
        before_s = self._cpu_s()
        time.sleep(seconds)
        return (self._cpu_s() - before_s) / seconds

    def _cpu_s(self) -> float:
        total_s = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                times_s = process.cpu_times()
                total_s += times_s.user + times_s.system
        return total_s

    def stop(self) -> None:
        """Close its stdin; kill what is left of it after a while."""
        self.resume()
        family = self._family()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(STOP_TIMEOUT_S)
        self._selector.close()


def pss_mb(pid: int) -> float:
    """Memory of a process, with its share of what it shares; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    kib = next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return kib * 1024 / 1e6
