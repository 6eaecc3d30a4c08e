"""The metrics port: Prometheus' exposition, and what a supervisor of this process asks and says.

In plain HTTP and without a key, whatever the ports for clients ask for: Kubernetes' probes have neither certificates
nor keys. `POST /drain` is for this machine alone.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from socketserver import TCPServer, ThreadingMixIn
from threading import BoundedSemaphore, Lock, Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from cluster.config import is_loopback_host

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

MIN_INTERVAL_S = 0.1
"""Between two collections: whoever reaches the port may ask without end, and what is asked is busy with requests."""
WAIT_S = 5.0
"""For one's turn to collect."""
MAX_REQUESTS = 64
"""At a time; a further connection is closed at once."""


class Exposition:
    """One port, with a thread for each request: a reader that stalls delays nobody."""

    def __init__(
        self,
        registry: CollectorRegistry,
        why_not_ready: Callable[[], str | None],
        begin_drain: Callable[[], None] | None = None,
    ) -> None:
        """All are called from other threads. Without `begin_drain` there is nothing here to drain.

        A TimeoutError of the first two is told as 503.
        """
        self._metrics: WSGIApplication = make_wsgi_app(registry)
        self._turn = Lock()
        self._free_s = 0.0
        self._why_not_ready = why_not_ready
        self._begin_drain = begin_drain
        self._running: _Running | None = None

    def start(self, host: str, port: int) -> int:
        """Listen. Returns the port. Raises OSError."""
        server = make_server(host, port, self._answer, _server_class(host), handler_class=_Handler)
        stopper, stopped = socket.socketpair()
        thread = Thread(target=server.serve_until, args=(stopped,), name="metrics port", daemon=True)
        thread.start()
        self._running = _Running(server, thread, stopper)
        return server.server_port

    def stop(self) -> None:
        """Close the port. Does nothing a second time."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stopper.close()
        running.thread.join()
        running.server.server_close()

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            return self._answer_in_time(environ, start_response)
        except TimeoutError:
            return _json(start_response, "503 Service Unavailable", {"error": "busy: no answer in time"})

    def _answer_in_time(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/ready":
                reason = self._why_not_ready()
                status = "200 OK" if reason is None else "503 Service Unavailable"
                return _json(start_response, status, {"ready": reason is None, "reason": reason})
            case "/drain" if self._begin_drain is not None:
                return _drain(self._begin_drain, environ, start_response)
            case _:
                return self._collect(environ, start_response)

    def _collect(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """One at a time. Raises TimeoutError."""
        if not self._turn.acquire(timeout=WAIT_S):
            raise TimeoutError
        try:
            # The thread is this request's own, and the wait at most MIN_INTERVAL_S.
            time.sleep(max(0.0, self._free_s - time.monotonic()))
            return self._metrics(environ, start_response)
        finally:
            self._free_s = time.monotonic() + MIN_INTERVAL_S
            self._turn.release()


def _drain(begin_drain: Callable[[], None], environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """POST /drain: take no new work, let streams end, close all ports. Answers at once."""
    if environ["REQUEST_METHOD"] != "POST":
        return _json(start_response, "405 Method Not Allowed", {"error": "POST it"})
    if not is_loopback_host(environ["REMOTE_ADDR"]):
        return _json(start_response, "403 Forbidden", {"error": "only from this machine"})
    begin_drain()
    return _json(start_response, "202 Accepted", {"draining": True})


def _json(start_response: StartResponse, status: str, value: dict[str, object]) -> Iterable[bytes]:
    body = json.dumps(value).encode()
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


@dataclass(frozen=True)
class _Running:
    server: _Server
    thread: Thread
    stopper: socket.socket
    """Its other end is what the thread watches beside its port: closing this one stops it."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    timeout = 0
    """No wait for a connection that has gone again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._places = BoundedSemaphore(MAX_REQUESTS)
        super().__init__(*args, **kwargs)

    def server_bind(self) -> None:
        """Without the library's question to DNS for our name, which nobody reads and which may take seconds."""
        TCPServer.server_bind(self)
        host, self.server_port = self.socket.getsockname()[:2]
        self.server_name = host
        self.setup_environ()

    def serve_until(self, stopped: socket.socket) -> None:
        """Answer until the other end of `stopped` is closed; socketserver's own loop looks for its end now and then."""
        with stopped, selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            selector.register(stopped, selectors.EVENT_READ)
            while all(key.fileobj is not stopped for key, _ in selector.select()):
                self.handle_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # there is no thread that would give it back
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()


class _ServerV6(_Server):
    address_family = socket.AF_INET6


def _server_class(host: str) -> type[_Server]:
    return _ServerV6 if ":" in host else _Server


class _Handler(WSGIRequestHandler):
    timeout = 10

    def log_message(self, format: str, *args: object) -> None:
        """A scrape every few seconds is no news."""
