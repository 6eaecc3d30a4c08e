"""The one table from error classes to status codes, and how an error ends a gRPC call."""

from __future__ import annotations

import logging
import traceback
from typing import Any, NoReturn

import grpc.aio
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # the package has no stubs

from cluster.errors import (
    DeadlinePassed,
    EngineError,
    Forbidden,
    LimitReached,
    MullError,
    NotReady,
    Overloaded,
    RequestError,
    SlowReader,
    Unauthenticated,
)
from cluster.gateway.requests import is_request_id, new_request_id
from workers.logs import log_fields

logger = logging.getLogger(__name__)

STATUS_CODES: dict[type[MullError], grpc.StatusCode] = {
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    SlowReader: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotReady: grpc.StatusCode.UNAVAILABLE,
    DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    EngineError: grpc.StatusCode.INTERNAL,
}
"""A class without a row has its nearest ancestor's code."""

MAX_MESSAGE_BYTES = 1024
"""gRPC clients take 8 KiB of trailers, in which a byte that is not ASCII takes three."""
REQUEST_ID_KEY = "mull-request-id"


def status_code(error: Exception) -> grpc.StatusCode:
    """The code of an error; INTERNAL for what was not raised on purpose."""
    for ancestor in type(error).__mro__:
        if ancestor in STATUS_CODES:
            return STATUS_CODES[ancestor]
    return grpc.StatusCode.INTERNAL


def short_message(error: MullError) -> str:
    """Its words, as far as they fit into a trailer, thrice: errors quote what clients sent."""
    words = str(error).encode()
    return str(error) if len(words) <= MAX_MESSAGE_BYTES else words[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore") + "…"


def log_fault(error: Exception, request_id: str) -> None:
    """What was not raised on purpose, and where. Its own words may quote a client's texts: only DEBUG has them."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    fields = log_fields(request_id=request_id)
    logger.error("request %s failed: %s\n%s", request_id, type(error).__name__, frames, extra=fields)
    logger.debug("request %s failed", request_id, exc_info=error, extra=fields)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, request_id: str) -> NoReturn:
    """End the call with the error's status; always raises.

    The text of an error that was not raised on purpose goes to the log, never to the client.
    """
    # Whatever the client sent as an id, what is written and sent back is short and on one line.
    request_id = request_id if is_request_id(request_id) else new_request_id()
    code = status_code(error)
    if isinstance(error, MullError):
        message = short_message(error)
    else:
        log_fault(error, request_id)
        message = f"an unexpected fault, logged under request id {request_id}"
    metadata: list[tuple[str, str | bytes]] = [(REQUEST_ID_KEY, request_id)]
    if isinstance(error, RequestError):
        metadata.append(("grpc-status-details-bin", _bad_request(error, code)))
    elif isinstance(error, LimitReached):
        metadata.append(("grpc-status-details-bin", _retry_info(error, code)))
    await context.abort(code, message, tuple(metadata))


def _bad_request(error: RequestError, code: grpc.StatusCode) -> bytes:
    """The standard details message (google.rpc.BadRequest) that names the field for programs."""
    violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=short_message(error))
    return _details(error_details_pb2.BadRequest(field_violations=[violation]), error, code)


def _retry_info(error: LimitReached, code: grpc.StatusCode) -> bytes:
    """The standard details message (google.rpc.RetryInfo) that tells programs when to try again."""
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
    return _details(info, error, code)


def _details(message: Message, error: MullError, code: grpc.StatusCode) -> bytes:
    status = status_pb2.Status(code=code.value[0], message=short_message(error))
    status.details.add().Pack(message)
    return bytes(status.SerializeToString())
