"""One rank as a process: load, report, then execute plans from a socket until told to stop.

Hop 6, the ranks' end; the Router's end is `cluster.router.shards`. Knows plans and a runner, nothing of requests or
clients. When its group is lost, a rank keeps its weights and waits for the config of the next one.

A process reads configs as lines of JSON on stdin and keeps stdin open: its end-of-file says that the Router is gone,
even while the rank is stuck in a collective. A Ray actor needs no such lifeline: Ray ends it with its owner.

Torch is imported only when a runner is built: the Router imports this module for its names.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec
import zmq

from workers.config import RunnerConfig
from workers.errors import MullError
from workers.launched import BeforeWait, Launched
from workers.logs import LogFormat, log_fields, write_logs
from workers.network import interface_towards
from workers.pulse import Pulse
from workers.step import (
    FromRank,
    HostMemory,
    PlacementUpdate,
    RankFailed,
    RankLoading,
    RankReady,
    Shutdown,
    StepPlan,
    StepResult,
    ToRank,
    decode_to_rank,
    encode,
)

log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 0.1
RECEIVE_POLL_MS = 200
FAREWELL_MS = 2_000
"""How long an ending rank waits for its last message to leave."""

LEAVE_TIMEOUT_S = 30.0
"""How long a rank may take to leave a group: its device finishes what it has, or is torn out of it."""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_ROUTER_GONE = 3
EXIT_STUCK = 5
GROUP_LOST = 4
"""Not the end: the rank can join another group."""

Progress = Callable[[int, int], None]
"""Called with (read_bytes, total_bytes) in the thread that builds the runner."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """What one rank needs to start."""

    runner: RunnerConfig
    endpoint: str
    """The Router's zmq address."""
    store_host: str | None = None
    """Where the ranks of a group find each other (a TCPStore in the Router's process); None for a single rank."""
    store_port: int | None = None
    connect_timeout_s: float = 600.0
    """How long a rank waits for the others while the group forms."""


class Runner(Protocol):
    """What this loop needs of a ModelRunner."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def host_memory(self) -> HostMemory | None:
        """For KV; None: none is kept there."""

    @property
    def num_exchanges(self) -> int:
        """Of all ranks, so far."""

    @property
    def num_group_exchanges(self) -> int:
        """Of its attention group alone, so far; 0 where that is all ranks."""

    def execute(self, plan: StepPlan) -> StepResult: ...
    def launch(self, plan: StepPlan, before_wait: BeforeWait) -> Launched:
        """Take a plan on; another may be launched before the result of this one is asked for."""

    def place(self, update: PlacementUpdate) -> None: ...
    def abort(self) -> None:
        """From another thread: whoever waits for other ranks waits no longer."""

    def forget(self) -> None:
        """Drop what would keep the group's channels from closing, for whoever aborts them waits for that."""

    def leave(self) -> None:
        """Leave the group; of use afterwards only to a runner that takes over its weights."""


RunnerFactory = Callable[[ShardConfig, Progress, Runner | None], Runner]
"""The last argument: who was here before, and has left its group."""


class RouterGone(Exception):
    """The connection to the Router ended: there is nobody left to compute for."""


def load_runner(config: ShardConfig, progress: Progress, previous: Runner | None) -> Runner:
    """The real runner: joins the group of ranks where there is one, then loads this rank's slice, unless it has it."""
    from workers.parallel import ParallelState
    from workers.runner import ModelRunner

    weights = previous.weights if isinstance(previous, ModelRunner) else None
    if config.store_host is None or config.store_port is None:
        return ModelRunner(config.runner, ParallelState.single(), progress, weights)
    if (interface := interface_towards(config.store_host)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    parallel = ParallelState.connect(
        config.runner.rank,
        config.runner.layout,
        config.store_host,
        config.store_port,
        config.runner.device,
        config.connect_timeout_s,
        symmetric_memory=config.runner.symmetric_memory,
        is_first_group=previous is None,
    )
    return ModelRunner(config.runner, parallel, progress, weights)


class RouterSocket:
    """The rank's end of the socket; one thread uses it."""

    def __init__(self, endpoint: str, rank: int) -> None:
        self._pulse = Pulse(endpoint, rank)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, str(rank).encode())
        self._socket.setsockopt(zmq.LINGER, FAREWELL_MS)
        self._socket.connect(endpoint)

    def send(self, message: FromRank) -> None:
        self._socket.send(encode(message))

    def receive(self) -> ToRank:
        """Wait for the next order; the pulse bounds the wait. Raises RouterGone."""
        while not self._socket.poll(RECEIVE_POLL_MS):
            if self._pulse.is_router_gone.is_set():
                raise RouterGone
        order: ToRank = decode_to_rank(self._socket.recv())
        return order

    def receive_before(self, step: Launched) -> ToRank | None:
        """An order that comes before the step is done; None where none does. Raises RouterGone.

        Looks again and again: a wait for the socket would end too late for the step, and one for the step too late for
        the order, which the device is to have before it is idle.
        """
        while not self._socket.poll(0):
            if step.is_done():
                return None
            if self._pulse.is_router_gone.is_set():
                raise RouterGone
        order: ToRank = decode_to_rank(self._socket.recv())
        return order

    def watch_over(self, runner: Runner) -> None:
        """Wake it out of its waits for other ranks when the Router lets go of the group."""
        self._pulse.watch_over(runner)

    def close(self) -> None:
        """Give the last message its time to leave, then free the socket."""
        self._socket.close()
        self._context.term()
        self._pulse.close()


class ThrottledProgress:
    """Turns a loader's frequent calls into at most ten messages a second, and one at the end."""

    def __init__(self, link: RouterSocket, rank: int) -> None:
        self._link = link
        self._rank = rank
        self._next_at = 0.0

    def __call__(self, read_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now >= self._next_at or read_bytes >= total_bytes:
            self._next_at = now + PROGRESS_INTERVAL_S
            self._link.send(RankLoading(self._rank, read_bytes, total_bytes))


class Rank:
    """A member of one group after another; its weights outlive them."""

    def __init__(self, build_runner: RunnerFactory = load_runner) -> None:
        self._build_runner = build_runner
        self._runner: Runner | None = None

    def serve(self, config: ShardConfig) -> int:
        """Join a group, report, execute its plans. Returns GROUP_LOST, or the exit status where this is the end.

        What went wrong has been told to the Router by then.
        """
        rank = config.runner.rank
        link = RouterSocket(config.endpoint, rank)
        runner: Runner | None = None
        try:
            runner = self._join(config, link)
            _serve_plans(link, runner)
            return EXIT_OK
        except RouterGone:
            log.warning("rank %d: the Router has let go of the group", rank)
            return GROUP_LOST
        except MullError as error:
            link.send(RankFailed(rank, str(error)))
        except Exception as error:  # the boundary of the process: whatever it was, the Router hears of it
            link.send(RankFailed(rank, _one_line(error), traceback.format_exc()))
        finally:
            _close(link, runner)
        return EXIT_FAILED if runner is None else GROUP_LOST

    def _join(self, config: ShardConfig, link: RouterSocket) -> Runner:
        started_at = time.monotonic()
        progress = ThrottledProgress(link, config.runner.rank)
        self._runner = runner = self._build_runner(config, progress, self._runner)
        link.watch_over(runner)
        # What a rank has loaded stays: a full collection need not look through it, which takes 0.2 s in a step.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        ready = _ready(config.runner, runner, time.monotonic() - started_at)
        link.send(ready)
        about = log_fields(rank=ready.rank, weight_bytes=ready.weight_bytes, kv_bytes=ready.kv_bytes)
        log.info("ready on %s in %.1f s", ready.device, ready.load_s, extra=about)
        return runner


def _close(link: RouterSocket, runner: Runner | None) -> None:
    """A device that never comes to rest keeps its rank from other groups: the process ends, and is started anew."""
    if runner is None:
        link.close()
        return
    watchdog = threading.Timer(LEAVE_TIMEOUT_S, os._exit, (EXIT_STUCK,))
    watchdog.daemon = True
    watchdog.start()
    try:
        runner.forget()
        link.close()
        runner.leave()
    finally:
        watchdog.cancel()


def _ready(config: RunnerConfig, runner: Runner, load_s: float) -> RankReady:
    return RankReady(
        rank=config.rank,
        pid=os.getpid(),
        host=socket.gethostname(),
        device=config.device,
        num_blocks=runner.num_blocks,
        block_size=config.block_size,
        weight_bytes=runner.weight_bytes,
        kv_bytes=runner.kv_bytes,
        load_s=load_s,
        host_memory=runner.host_memory,
    )


def _serve_plans(link: RouterSocket, runner: Runner) -> None:
    """Everything strictly in order: a plan's experts lie where the last placement before it has put them.

    A plan that comes while a device still computes the one before it is launched behind that one at once. The result of
    that one leaves when the launch is over, or when it begins to wait for the device itself.
    """
    ahead: Launched | None = None
    while True:
        order = link.receive() if ahead is None else link.receive_before(ahead)
        owed = _Owed(link, ahead)
        launched = runner.launch(order, owed.send) if isinstance(order, StepPlan) else None
        owed.send()
        ahead = launched
        if ahead is not None and ahead.is_done():
            link.send(ahead.result())
            ahead = None
        if isinstance(order, PlacementUpdate):
            runner.place(order)
        if isinstance(order, Shutdown):
            return


class _Owed:
    """The result of a step that is under way, if there is one: sent once."""

    def __init__(self, link: RouterSocket, step: Launched | None) -> None:
        self._link, self._step = link, step

    def send(self) -> None:
        """Waits for the step."""
        step, self._step = self._step, None
        if step is not None:
            self._link.send(step.result())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class ShardActor:
    """A rank as a Ray actor. Ray only starts it and watches it: plans come over the socket."""

    def __init__(self, log_format: LogFormat = "text") -> None:
        self._log_format = log_format
        self._rank = Rank()

    def run(self, config: ShardConfig) -> int:
        """See `Rank.serve`; after GROUP_LOST it may be called again."""
        write_logs(self._log_format, f"rank-{config.runner.rank}")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return self._rank.serve(config)


class Lifeline:
    """The configs that come in on stdin. The process ends when the Router's end closes, whatever its threads do."""

    def __init__(self) -> None:
        self._configs: queue.SimpleQueue[ShardConfig] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="lifeline", daemon=True).start()

    def next_config(self) -> ShardConfig:
        """Waits for it as long as the Router lives."""
        return self._configs.get()

    def _read(self) -> None:
        unread = b""
        while received := os.read(0, 65536):
            *lines, unread = (unread + received).split(b"\n")
            for line in lines:
                self._configs.put(msgspec.json.decode(line, type=ShardConfig))
        os._exit(EXIT_ROUTER_GONE)


def main(build_runner: RunnerFactory = load_runner) -> int:
    """A rank as a local process."""
    # Ctrl-C in a terminal reaches the whole foreground group; the server decides when its ranks end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lifeline, rank = Lifeline(), Rank(build_runner)
    while (status := rank.serve(lifeline.next_config())) == GROUP_LOST:
        pass
    return status


if __name__ == "__main__":
    write_logs("text", "rank")
    sys.exit(main())
