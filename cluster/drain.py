"""`mull drain`: ask the gateway of this machine to let its streams end, and wait until it has closed.

What Kubernetes runs before it ends a pod. Knows nothing but the metrics port.
"""

from __future__ import annotations

import time
from http.client import HTTPConnection, HTTPException

from cluster.errors import EngineError

_POLL_S = 0.5
_CALL_TIMEOUT_S = 5.0


def drain(port: int, *, delay_s: float, wait_s: float) -> str:
    """Wait `delay_s` for others to stop sending work here, then drain. Returns what happened, in words.

    Raises EngineError when the gateway refuses, or has not closed within `wait_s`.
    """
    time.sleep(delay_s)
    status = _call("POST", "/drain", port)
    if status is None:
        return f"nothing listens on port {port}, so there is nothing to drain"
    if status != 202:
        raise EngineError(f"the gateway on port {port} answered {status} to /drain; is it the metrics port?")
    deadline_s = time.monotonic() + wait_s
    while time.monotonic() < deadline_s:
        if _call("GET", "/ready", port) is None:
            return "drained"
        time.sleep(_POLL_S)
    raise EngineError(f"the gateway on port {port} still has streams after {wait_s:g} s")


def _call(method: str, path: str, port: int) -> int | None:
    """The status; None where nobody listens any more."""
    connection = HTTPConnection("127.0.0.1", port, timeout=_CALL_TIMEOUT_S)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    except (ConnectionError, HTTPException):
        return None
    except TimeoutError as error:
        raise EngineError(f"port {port} did not answer {method} {path} within {_CALL_TIMEOUT_S:g} s") from error
    finally:
        connection.close()
