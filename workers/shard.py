"""One rank as a process: load, report, then execute plans from a socket until told to stop.

Hop 6, the ranks' end; the Router's end is `cluster.router.shards`. Knows plans and a runner, nothing of requests or
clients. A process reads its config as one line of JSON on stdin and keeps stdin open: its end-of-file says that the
Router is gone, even while the rank is stuck in a collective. A Ray actor needs no such lifeline: Ray ends it with its
owner, the Router.

Torch is imported only when a runner is built: the Router imports this module for its names.
"""

from __future__ import annotations

import logging
import os
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
from workers.network import interface_towards
from workers.step import (
    FromRank,
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
HEARTBEAT_INTERVAL_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 30_000
"""A Router whose machine vanished without closing its connection counts as gone after this time."""
FAREWELL_MS = 2_000
"""How long an ending rank waits for its last message to leave."""

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_ROUTER_GONE = 3

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
    def execute(self, plan: StepPlan) -> StepResult: ...
    def place(self, update: PlacementUpdate) -> None: ...


RunnerFactory = Callable[[ShardConfig, Progress], Runner]


class RouterGone(Exception):
    """The connection to the Router ended: there is nobody left to compute for."""


def load_runner(config: ShardConfig, progress: Progress) -> Runner:
    """The real runner: joins the group of ranks where there is one, then loads this rank's slice."""
    from workers.parallel import ParallelState
    from workers.runner import ModelRunner

    if config.store_host is None or config.store_port is None:
        return ModelRunner(config.runner, ParallelState.single(), progress=progress)
    if (interface := interface_towards(config.store_host)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    parallel = ParallelState.connect(
        config.runner.rank,
        config.runner.layout,
        config.store_host,
        config.store_port,
        config.runner.device,
        config.connect_timeout_s,
    )
    return ModelRunner(config.runner, parallel, progress=progress)


class RouterSocket:
    """The rank's end of the socket; one thread uses it."""

    def __init__(self, endpoint: str, rank: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, str(rank).encode())
        self._socket.setsockopt(zmq.LINGER, FAREWELL_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.connect(endpoint)

    def send(self, message: FromRank) -> None:
        self._socket.send(encode(message))

    def receive(self) -> ToRank:
        """Wait for the next order; the heartbeat bounds the wait. Raises RouterGone."""
        while True:
            ready = dict(self._poller.poll())
            if self._socket in ready:
                order: ToRank = decode_to_rank(self._socket.recv())
                return order
            if self._monitor in ready:
                raise RouterGone

    def close(self) -> None:
        """Give the last message its time to leave, then free the sockets."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        self._context.term()


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


def run_shard(config: ShardConfig, build_runner: RunnerFactory = load_runner) -> int:
    """Load, report, execute plans. Returns the exit status; a failure has been told to the Router by then."""
    rank = config.runner.rank
    link = RouterSocket(config.endpoint, rank)
    try:
        started_at = time.monotonic()
        runner = build_runner(config, ThrottledProgress(link, rank))
        link.send(_ready(config.runner, runner, time.monotonic() - started_at))
        _serve_plans(link, runner)
        return EXIT_OK
    except RouterGone:
        log.warning("rank %d: the Router is gone; ending", rank)
        return EXIT_ROUTER_GONE
    except MullError as error:
        link.send(RankFailed(rank, str(error)))
        return EXIT_FAILED
    except Exception as error:  # the boundary of the process: whatever it was, the Router hears of it
        link.send(RankFailed(rank, _one_line(error), traceback.format_exc()))
        return EXIT_FAILED
    finally:
        link.close()


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
    )


def _serve_plans(link: RouterSocket, runner: Runner) -> None:
    """Everything strictly in order: a plan's experts lie where the last placement before it has put them."""
    while not isinstance(order := link.receive(), Shutdown):
        match order:
            case StepPlan():
                link.send(runner.execute(order))
            case PlacementUpdate():
                runner.place(order)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class ShardActor:
    """A rank as a Ray actor. Ray only starts it and watches it: plans come over the socket."""

    def run(self, config: ShardConfig) -> int:
        """Returns when the Router has sent Shutdown, or with a non-zero status after a failure."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return run_shard(config)


def _read_config() -> ShardConfig:
    """The first line of stdin; what follows is only the lifeline."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise RouterGone
        line += byte
    return msgspec.json.decode(bytes(line), type=ShardConfig)


def _hold_lifeline() -> None:
    """Ends the process, whatever its other threads do, when the Router's end of stdin closes."""
    while os.read(0, 1):
        pass
    os._exit(EXIT_ROUTER_GONE)


def main(build_runner: RunnerFactory = load_runner) -> int:
    """A rank as a local process."""
    # Ctrl-C in a terminal reaches the whole foreground group; the server decides when its ranks end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = _read_config()
    threading.Thread(target=_hold_lifeline, name="lifeline", daemon=True).start()
    return run_shard(config, build_runner)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    sys.exit(main())
