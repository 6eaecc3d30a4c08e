"""A Router's metrics port: what it tells Prometheus of itself and its ranks, and whether it is ready.

Several Routers may be on one node, and one that is to go may still have its port when its successor starts: the port
is the first free one of a few, and is looked for until there is one. A Router works without it meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from cluster.config import TlsFiles
from cluster.errors import EngineError
from cluster.exposition import Exposition
from cluster.metrics.plain import Reading
from cluster.metrics.process import CERTIFICATES, register_process
from cluster.tls import certificate_ends

log = logging.getLogger(__name__)

_T = TypeVar("_T")

RETRY_S = 1.0
ANSWER_TIMEOUT_S = 5.0
EVERYWHERE = ("0.0.0.0", "::")


class MetricsPort:
    """`open` it, later `close` it. To be made in the event loop that owns what it tells."""

    def __init__(self, collectors: Iterable[Collector], why_not_ready: Callable[[], str | None], model: str) -> None:
        self.address = ""
        """host:port; empty while it is not open."""
        loop = asyncio.get_running_loop()
        self._registry = CollectorRegistry()
        self._registry.register(_InLoop(collectors, loop))
        register_process(self._registry, model)
        self._exposition = Exposition(self._registry, _in_loop(why_not_ready, loop))
        self._opener: asyncio.Task[None] | None = None
        self._here = ""

    def show_certificate(self, link: TlsFiles) -> None:
        """When the certificate towards gateways ends."""
        self._registry.register(Reading(CERTIFICATES, lambda: certificate_ends(None, link)))

    def open(self, host: str, ports: Sequence[int], here: str) -> None:
        """Listen on the first of `ports` that is free, now or once one is. Raises EngineError where none can be had.

        `here`: a host that leads to this machine, to be told where `host` is every address.
        """
        self._here = here.strip("[]")
        try:
            if self._try(host, ports):
                return
        except OSError as error:
            raise EngineError(
                f"the Router cannot serve its metrics on {host}, ports {ports[0]} to {ports[-1]} ({error.strerror}); "
                "choose another router.metrics_port"
            ) from error
        log.warning("metrics: ports %d to %d of %s are taken; waiting for one", ports[0], ports[-1], host)
        self._opener = asyncio.create_task(self._keep_trying(host, ports), name="metrics port")

    async def close(self) -> None:
        """Stop listening, or trying to."""
        if self._opener is not None:
            self._opener.cancel()
            await asyncio.gather(self._opener, return_exceptions=True)
        # It waits for a thread, which may wait for this loop.
        await asyncio.to_thread(self._exposition.stop)
        self.address = ""

    async def _keep_trying(self, host: str, ports: Sequence[int]) -> None:
        try:
            while not self._try(host, ports):  # noqa: ASYNC110  # there is no event for a port that becomes free
                await asyncio.sleep(RETRY_S)
        except OSError as error:
            log.error("metrics: ports %d to %d of %s cannot be had (%s); none here", ports[0], ports[-1], host, error)

    def _try(self, host: str, ports: Sequence[int]) -> bool:
        for port in ports:
            try:
                bound = self._exposition.start(host, port)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                shown = self._here if host in EVERYWHERE else host
                self.address = f"[{shown}]:{bound}" if ":" in shown else f"{shown}:{bound}"
                log.info("metrics at %s", self.address)
                return True
        return False


class _InLoop(Collector):
    """Collects where nothing changes meanwhile."""

    def __init__(self, collectors: Iterable[Collector], loop: asyncio.AbstractEventLoop) -> None:
        parts = tuple(collectors)
        self._collect = _in_loop(lambda: [metric for part in parts for metric in part.collect()], loop)

    def collect(self) -> list[Metric]:
        return self._collect()


def _in_loop(function: Callable[[], _T], loop: asyncio.AbstractEventLoop) -> Callable[[], _T]:
    """For other threads. A loop that does not come to it in time is a TimeoutError, and a scrape fails: that is what
    `up` is for.
    """

    async def call() -> _T:
        return function()

    def ask() -> _T:
        asked = asyncio.run_coroutine_threadsafe(call(), loop)
        try:
            return asked.result(ANSWER_TIMEOUT_S)
        except TimeoutError:
            asked.cancel()
            raise

    return ask
