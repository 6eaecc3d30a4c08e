"""HttpServer: uvicorn on a port of its own, in the event loop of its gateway."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn

from cluster.config import GatewayConfig
from cluster.errors import EngineError
from cluster.gateway.access import Access
from cluster.gateway.core import GenerationCore
from cluster.gateway.http.bounded_protocol import bounded_protocol
from cluster.gateway.http.door import HttpDoor
from cluster.gateway.http.exchanges import Exchanges
from cluster.gateway.http.kept import KeepPolicy, KeptStreams
from cluster.gateway.http.routes import WhyNotReady, build_http_app
from cluster.tls import ServerCertificates

START_TIMEOUT_S = 10.0
CLOSE_S = 1.0
"""For last bytes on their way, once all exchanges have ended or were cut."""
CLOSE_POLL_S = 0.005
"""Between two looks whether they have left."""
DATE_S = 1.0
"""How old the date in the heads of answers may be."""
BACKLOG = 1024


class HttpServer:
    """Start it on an open socket, later stop it."""

    def __init__(
        self,
        core: GenerationCore,
        config: GatewayConfig,
        why_not_ready: WhyNotReady,
        access: Access,
        certificates: ServerCertificates | None = None,
    ) -> None:
        """`certificates` make it an HTTPS port."""
        self._exchanges = Exchanges()
        policy = KeepPolicy(
            retention_s=config.stream_retention_s,
            max_streams=config.max_kept_streams,
            max_bytes=config.max_kept_stream_bytes,
        )
        self._kept = KeptStreams(policy)
        app = HttpDoor(build_http_app(core, config, why_not_ready, self._exchanges, self._kept), access)
        settings = uvicorn.Config(
            app,
            http=bounded_protocol(config.head_timeout_s),
            timeout_keep_alive=math.ceil(config.idle_timeout_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            ssl_context_factory=None if certificates is None else lambda *_: certificates.ssl_context(),
        )
        self._server = _Uvicorn(settings)
        self._task: asyncio.Task[None] | None = None

    @property
    def is_serving(self) -> bool:
        """Whether its task runs as it should."""
        return self._task is not None and not self._task.done()

    async def start(self, listener: socket.socket) -> None:
        """Answer on `listener`, which is closed in the end. Raises EngineError."""
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="http server")
        listening = asyncio.create_task(self._server.listening.wait())
        done, _ = await asyncio.wait({self._task, listening}, timeout=START_TIMEOUT_S, return_when="FIRST_COMPLETED")
        if listening not in done:
            listening.cancel()
            raise EngineError("the HTTP server did not start") from (self._task.exception() if done else None)

    async def stop(self) -> None:
        """Interrupt what still runs, and close the port."""
        self._exchanges.cut()
        await self._kept.close()
        if self._task is not None:
            self._server.leave()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the process that it runs in, says when it listens, and stops at once.

    uvicorn's own looks ten times a second whether it is to stop, and takes two such times to do it.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        """Begin to stop: `serve` returns after at most CLOSE_S."""
        self.should_exit = True
        self._leaving.set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), DATE_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for listener in (*self.servers, *(sockets or ())):
            listener.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        for _ in range(int(CLOSE_S / CLOSE_POLL_S)):
            if not self.server_state.connections and not self.server_state.tasks:
                return
            await asyncio.sleep(CLOSE_POLL_S)
        for task in self.server_state.tasks:
            task.cancel("no time was left to send the rest")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
