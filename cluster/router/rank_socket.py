"""The Router's end of the socket to its ranks: one ROUTER socket on the event loop.

Hop 6. Bytes to a rank, decoded messages from ranks; knows nothing of steps. It reads zmq's file descriptor itself:
zmq.asyncio costs a future and a trip through the loop for every message.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import cast

import msgspec
import zmq

from workers.pulse import pulse_identity
from workers.step import FromRank, decode_from_rank

log = logging.getLogger(__name__)


SOCKET_NAME = "ranks"
_RANDOM_CHARS = 8
"""What mkdtemp adds to a prefix."""


class RankSocket:
    """Binds on creation, on the running event loop. `on_message` gets what ranks send, in each rank's order."""

    def __init__(self, host: str | None, on_message: Callable[[FromRank], None]) -> None:
        """`host` None: the ranks are local, and the address lies in a directory that only we can open; else tcp."""
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._directory = _make_directory() if host is None else None
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(f"ipc://{self._directory}/{SOCKET_NAME}" if host is None else f"tcp://{host}:*")
        self.endpoint: str = self._socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._descriptor = self._socket.fileno()
        self._loop.add_reader(self._descriptor, self._drain)

    def send(self, rank: int, data: bytes) -> bool:
        """Never blocks. False: the rank is not connected, or has thousands of messages unread."""
        return self._send(str(rank).encode(), data)

    def send_to_pulse(self, rank: int, data: bytes) -> bool:
        """The same to the thread that listens while a step hangs."""
        return self._send(pulse_identity(rank), data)

    def _send(self, identity: bytes, data: bytes) -> bool:
        try:
            self._socket.send_multipart((identity, data), flags=zmq.DONTWAIT)
        except zmq.ZMQError as error:
            log.warning("rank %s cannot be reached: %s", identity.decode(), error)
            return False
        self._look_again()
        return True

    def _look_again(self) -> None:
        # zmq's descriptor is edge-triggered, and a send may have consumed the edge of a message that came meanwhile.
        if cast(int, self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        while not self._socket.closed:
            try:
                sender, data = self._socket.recv_multipart(flags=zmq.DONTWAIT)
            except zmq.Again:
                return
            self._deliver(sender, data)

    def _deliver(self, sender: bytes, data: bytes) -> None:
        try:
            message = decode_from_rank(data)
        except msgspec.MsgspecError as error:
            log.error("dropped %d bytes from %r that are not a rank's message: %s", len(data), sender, error)
            return
        if sender not in (str(message.rank).encode(), pulse_identity(message.rank)):
            log.error("dropped a message from %r that claims to be rank %d", sender, message.rank)
            return
        self._on_message(message)

    def remove_address(self) -> None:
        """Nobody else can connect from now on, and a killed Router leaves no file behind."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def close(self) -> None:
        """Close the socket and remove its directory. May be called again."""
        if not self._socket.closed:
            self._loop.remove_reader(self._descriptor)
            self._socket.close()
            self._context.term()
        self.remove_address()


def _make_directory() -> str:
    """In the directory for temporary files, or in /tmp where that one's name is too long for a socket's address."""
    prefix = f"mull-{os.getpid()}-"
    longest = f"{tempfile.gettempdir()}/{prefix}{'x' * _RANDOM_CHARS}/{SOCKET_NAME}"
    fits = len(os.fsencode(longest)) <= zmq.IPC_PATH_MAX_LEN
    return tempfile.mkdtemp(prefix=prefix, dir=None if fits else "/tmp")
