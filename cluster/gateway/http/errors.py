"""The one table from error classes to HTTP statuses, and OpenAI's shape of an error."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cluster.errors import (
    DeadlinePassed,
    Forbidden,
    LimitReached,
    MullError,
    NotReady,
    Overloaded,
    PromptTooLong,
    RequestError,
    SlowReader,
    Unauthenticated,
    UnknownModel,
)
from cluster.gateway.http.parts import Json
from cluster.gateway.status import log_fault, short_message

RETRY_AFTER_S = 1


class BodyTooLarge(RequestError):
    """The request's body passes the bound."""


class StreamGone(RequestError):
    """No stream is kept under that event id, or not from there on."""


class BodyTooLate(RequestError):
    """The request's body did not come in time."""


@dataclass(frozen=True)
class HttpStatus:
    """How an error looks from outside."""

    status: int
    type: str
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()


_RETRY = (("retry-after", str(RETRY_AFTER_S)),)

STATUSES: dict[type[Exception], HttpStatus] = {
    RequestError: HttpStatus(400, "invalid_request_error"),
    PromptTooLong: HttpStatus(400, "invalid_request_error", "context_length_exceeded"),
    UnknownModel: HttpStatus(404, "invalid_request_error", "model_not_found"),
    StreamGone: HttpStatus(410, "invalid_request_error", "stream_gone"),
    BodyTooLarge: HttpStatus(413, "invalid_request_error", "request_too_large"),
    BodyTooLate: HttpStatus(408, "invalid_request_error", "request_timeout", (("connection", "close"),)),
    Unauthenticated: HttpStatus(401, "invalid_request_error", "invalid_api_key", (("www-authenticate", "Bearer"),)),
    Forbidden: HttpStatus(403, "invalid_request_error", "insufficient_permissions"),
    LimitReached: HttpStatus(429, "rate_limit_error", "rate_limit_exceeded"),
    Overloaded: HttpStatus(429, "rate_limit_error", "overloaded", _RETRY),
    SlowReader: HttpStatus(429, "rate_limit_error", "slow_reader"),
    DeadlinePassed: HttpStatus(504, "server_error", "deadline_passed"),
    NotReady: HttpStatus(503, "server_error", "not_ready", _RETRY),
    Exception: HttpStatus(500, "server_error", "internal_error"),
}
"""A class without a row has its nearest ancestor's."""


def http_status(error: Exception) -> HttpStatus:
    """The row of an error."""
    return next(STATUSES[ancestor] for ancestor in type(error).__mro__ if ancestor in STATUSES)


def error_headers(error: Exception) -> dict[str, str]:
    """The headers of its row, and when to try again where that is known."""
    headers = dict(http_status(error).headers)
    if isinstance(error, LimitReached):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return headers


def error_json(error: Exception, request_id: str) -> Json:
    """OpenAI's error document. The text of an error that was not raised on purpose goes to the log alone."""
    row = http_status(error)
    message = short_message(error) if isinstance(error, MullError) else ""
    param = None
    if not isinstance(error, MullError):
        log_fault(error, request_id)
        message = f"an unexpected fault, logged under request id {request_id}"
    elif isinstance(error, RequestError):
        param = _http_name(error.field)
        message = message.replace(error.field, param, 1) if message.startswith(error.field) else message
    return {"error": {"message": message, "type": row.type, "param": param, "code": row.code}}


def _http_name(field: str) -> str:
    """The field of GenerateRequest → the body's: what is grouped there is flat here."""
    return re.sub(r"^(sampling|conversation)\.", "", field)
