"""Exchanges under way: each ends early when its client goes, and all of them when the server must stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from cluster.errors import NotReady


class ClientGone(Exception):
    """The client has closed its connection: there is nobody to answer."""


class Exchanges:
    """The tasks that answer requests now."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()
        self._is_cut = False

    def cut(self) -> None:
        """Interrupt all of them: their clients are told that the server is shutting down."""
        self._is_cut = True
        for task in self._tasks:
            task.cancel()

    @asynccontextmanager
    async def watched(self, receive: Receive) -> AsyncIterator[None]:
        """Inside, the client's going away raises ClientGone, and `cut` raises NotReady."""
        task = asyncio.current_task()
        assert task is not None
        gone = asyncio.create_task(_gone(receive, task), name="disconnect watcher")
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if gone.done() and not gone.cancelled() and task.uncancel() == 0:
                raise ClientGone from None
            if self._is_cut and task.uncancel() == 0:
                raise NotReady("this server is shutting down; send the request to another one") from None
            raise
        finally:
            self._tasks.discard(task)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)


async def _gone(receive: Receive, answering: asyncio.Task[object]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.cancel()
