"""Ports that stay a server's own from the moment they are chosen: while it starts, and while it starts again.

A port that is only looked at can be gone a moment later. The kernel takes the local ports of connections from the same
range as free ports, and Ray's processes open a hundred connections before a gateway listens.
"""

from __future__ import annotations

import socket
from types import TracebackType


class HeldPorts:
    """Use as a context manager: the ports are held until its end.

    Holds a port by a socket that is bound and never listens. The kernel then gives it to no connection and to nobody
    who asks for a free one, and a server with SO_REUSEADDR, which all servers set, can still listen on it (Linux: a
    bind conflicts with a socket that listens, or that was bound without SO_REUSEADDR).
    """

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> HeldPorts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def hold(self, host: str, port: int = 0) -> int:
        """The port itself, or a free one for 0. Raises OSError where a server listens on it, or `host` is not here."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        held = socket.socket(family, socket.SOCK_STREAM)
        self._sockets.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
        return int(held.getsockname()[1])

    def close(self) -> None:
        """Let them go."""
        while self._sockets:
            self._sockets.pop().close()
