"""A rank's sign of life beside its steps: every second it tells the Router that the process lives and how far it is.

Hop 6. A thread with a socket of its own: it beats while a step hangs, and falls silent where the process is stopped. It
also finds out that the Router has closed its end, or that its machine has vanished, and then wakes who waits for other
ranks.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from workers.step import RankPulse, encode

PULSE_INTERVAL_MS = 1_000
HEARTBEAT_INTERVAL_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 30_000
"""A Router whose machine vanished without closing its connection counts as gone after this time."""
CONNECT_TIMEOUT_S = 60.0


def pulse_identity(rank: int) -> bytes:
    """How the Router knows this socket from the one of the steps."""
    return f"{rank}.pulse".encode()


class Waiter(Protocol):
    """Who may wait for other ranks."""

    @property
    def num_exchanges(self) -> int: ...
    def abort(self) -> None: ...


class Pulse:
    """Beats from its making, which waits until it is connected, to `close`."""

    def __init__(self, endpoint: str, rank: int) -> None:
        self.is_router_gone = threading.Event()
        self._rank = rank
        self._waiter: Waiter | None = None
        self._is_connected = threading.Event()
        self._context = zmq.Context()
        self._stopper = self._context.socket(zmq.PAIR)
        self._stopper.bind("inproc://stop")
        self._thread = threading.Thread(target=self._beat, args=(endpoint,), name="pulse", daemon=True)
        self._thread.start()
        if not self._is_connected.wait(CONNECT_TIMEOUT_S):
            raise TimeoutError(f"rank {rank} could not connect to the Router at {endpoint} in {CONNECT_TIMEOUT_S:g} s")

    def watch_over(self, waiter: Waiter) -> None:
        """Whom to wake when the Router is gone."""
        self._waiter = waiter
        if self.is_router_gone.is_set():
            waiter.abort()

    def close(self) -> None:
        """Ends the thread. Call it once."""
        self._stopper.send(b"")
        self._thread.join()
        self._stopper.close(linger=0)
        self._context.term()

    def _beat(self, endpoint: str) -> None:
        stop = self._context.socket(zmq.PAIR)
        stop.connect("inproc://stop")
        socket = self._socket()
        monitor = socket.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        socket.connect(endpoint)
        poller = zmq.Poller()
        poller.register(stop, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        while stop not in (ready := dict(poller.poll(PULSE_INTERVAL_MS))):
            if monitor in ready:
                self._on_event(parse_monitor_message(monitor.recv_multipart())["event"])
            num_exchanges = self._waiter.num_exchanges if self._waiter is not None else 0
            with contextlib.suppress(zmq.Again):  # a Router that does not read knows that by itself
                socket.send(encode(RankPulse(self._rank, num_exchanges)), flags=zmq.DONTWAIT)
        socket.disable_monitor()
        for each in (monitor, socket, stop):
            each.close(linger=0)

    def _socket(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, pulse_identity(self._rank))
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        return socket

    def _on_event(self, event: int) -> None:
        if event == zmq.EVENT_CONNECTED:
            self._is_connected.set()
            return
        self.is_router_gone.set()
        if self._waiter is not None:
            self._waiter.abort()
