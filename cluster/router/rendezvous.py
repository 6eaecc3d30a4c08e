"""Where the ranks of one group find each other: a TCPStore that lives in the Router's process.

Hop 6, at the start of a group only. It is here and not in a rank so that it outlives every rank of the group.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any


class Rendezvous:
    """Listens at once, so that ranks may connect; answers from `open` on, which imports torch (seconds) in a thread."""

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server((host, 0))
        self._store: Any = None
        self._is_closed = False
        self.host, self.port = self._listener.getsockname()[:2]

    async def open(self) -> None:
        await asyncio.to_thread(self._serve)

    def _serve(self) -> None:
        # Not at the top: a Router with one rank has no use for torch.
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

        if self._is_closed:
            return
        self._store = TCPStore(
            self.host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=self._listener.detach(),  # the store closes it
        )
        # `open` may have been cancelled meanwhile, which its thread cannot be; `close` sets the flag before it looks.
        if self._is_closed:
            self._store = None

    def close(self) -> None:
        """Also while `open` is under way: nothing listens once its thread has ended."""
        self._is_closed = True
        self._listener.close()
        self._store = None
