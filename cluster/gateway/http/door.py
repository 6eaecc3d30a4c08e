"""HttpDoor: lets requests in by their API key, before their bodies are read.

Hop 2 over HTTP. The chat page is open, because it asks its reader for the key; so is what probes ask.
"""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.errors import MullError
from cluster.gateway.access import Access, Caller
from cluster.gateway.http.answer import error_answer
from cluster.gateway.requests import is_request_id, new_request_id
from cluster.keys import Scope as KeyScope

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version", "/openapi.json"})
ANY_KEY_PREFIX = "/v1/models"


class HttpDoor:
    """Answers requests without the key that they need; hands on the others, with their caller."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "neither lifespan nor websockets are served"
        if scope["path"] not in OPEN_PATHS:
            headers = Headers(scope=scope)
            try:
                needed = None if scope["path"].startswith(ANY_KEY_PREFIX) else KeyScope.GENERATE
                caller = self._access.admit(_authorization(headers), needed)
            except MullError as error:
                given = headers.get("x-request-id", "")
                request_id = given if is_request_id(given) else new_request_id()
                await error_answer(error, request_id)(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
        try:
            await self._app(scope, receive, send)
        except Exception:
            # Answered and logged where it was raised; uvicorn would log its words, which may be the client's.
            logger.debug("a request failed", exc_info=True)


def caller_of(request: Request) -> Caller:
    """Whom the door has let in."""
    caller: Caller = request.state.caller
    return caller


def _authorization(headers: Headers) -> str | None:
    """The one value; several are as good as none: which of them counts must not be a matter of taste."""
    values = headers.getlist("authorization")
    return values[0] if len(values) == 1 else None
