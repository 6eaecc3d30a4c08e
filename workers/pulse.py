"""A rank's sign of life beside its steps: every second it tells the Router that the process lives and how far it is.

Hop 6. A thread with a socket of its own: it beats while a step hangs, and falls silent where the process is stopped. It
also finds out that the Router has closed its end, or that its machine has vanished, and then wakes who waits for other
ranks, as it does when the Router asks.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from workers.step import RankPulse, decode_to_pulse, encode

log = logging.getLogger(__name__)

PULSE_INTERVAL_MS = 1_000
HEARTBEAT_INTERVAL_MS = 5_000
HEARTBEAT_TIMEOUT_MS = 30_000
"""A Router whose machine vanished without closing its connection counts as gone after this time."""
CONNECT_TIMEOUT_S = 60.0
WAKING_TIMEOUT_S = 10.0
"""A rank that is closed has left nothing for its waker to wait for."""


def pulse_identity(rank: int) -> bytes:
    """How the Router knows this socket from the one of the steps."""
    return f"{rank}.pulse".encode()


class Waiter(Protocol):
    """Who may wait for other ranks."""

    @property
    def num_exchanges(self) -> int: ...
    @property
    def num_group_exchanges(self) -> int: ...
    def abort(self) -> None: ...


class Pulse:
    """Beats from its making, which waits until it is connected, to `close`."""

    def __init__(self, endpoint: str, rank: int) -> None:
        self.is_router_gone = threading.Event()
        self._rank = rank
        self._waiter: Waiter | None = None
        self._waker: threading.Thread | None = None
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
        if self._waker is not None:
            self._waker.join(WAKING_TIMEOUT_S)
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
        poller.register(socket, zmq.POLLIN)
        while stop not in (ready := dict(poller.poll(PULSE_INTERVAL_MS))):
            if monitor in ready:
                self._on_event(parse_monitor_message(monitor.recv_multipart())["event"])
            if socket in ready:
                decode_to_pulse(socket.recv())
                self._wake_up()
            with contextlib.suppress(zmq.Again):  # a Router that does not read knows that by itself
                socket.send(encode(self._pulse()), flags=zmq.DONTWAIT)
        socket.disable_monitor()
        for each in (monitor, socket, stop):
            each.close(linger=0)

    def _pulse(self) -> RankPulse:
        if self._waiter is None:
            return RankPulse(self._rank, 0)
        return RankPulse(self._rank, self._waiter.num_exchanges, self._waiter.num_group_exchanges)

    def _wake_up(self) -> None:
        """In a thread of its own: NCCL lets go of what waits at once, but comes back when nothing is recorded any more,
        which happens when the rank leaves its group.
        """
        if self._waiter is not None and self._waker is None:
            log.warning("rank %d: the Router wakes it out of its waits for other ranks", self._rank)
            self._waker = threading.Thread(target=self._waiter.abort, name="wake up", daemon=True)
            self._waker.start()

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
