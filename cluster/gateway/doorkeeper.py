"""Lets gRPC calls in by their API key, before their message is read.

Hop 2 over gRPC. Health and reflection are open: they tell nothing of anyone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from cluster.errors import DeadlinePassed, InvalidRequest, MullError
from cluster.gateway.access import Access, Caller
from cluster.gateway.requests import new_request_id
from cluster.gateway.status import abort
from cluster.keys import Scope

Context = grpc.aio.ServicerContext[Any, Any]
_ADMIN = "/mull.v1.AdminService/"
_OURS = "/mull.v1."
_ANY_KEY = frozenset({"/mull.v1.GenerationService/ListModels", "/mull.v1.GenerationService/GetServerInfo"})


def caller_of(context: Context, access: Access) -> Caller:
    """Who a call is from. Raises Unauthenticated."""
    return access.caller(_authorization(context.invocation_metadata() or ()))


class Doorkeeper(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Ends calls without the key that they need, and those whose message does not come."""

    def __init__(self, access: Access, message_timeout_s: float) -> None:
        self._access = access
        self._message_timeout_s = message_timeout_s

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        details = handler_call_details
        if not details.method.startswith(_OURS):
            return await continuation(details)
        try:
            self._access.admit(_authorization(details.invocation_metadata or ()), _scope_of(details.method))
        except MullError as error:
            return _refusal(error)
        handler = await continuation(details)
        return handler and _bounded(handler, self._message_timeout_s)


def _scope_of(method: str) -> Scope | None:
    if method in _ANY_KEY:
        return None
    return Scope.ADMIN if method.startswith(_ADMIN) else Scope.GENERATE


def _authorization(metadata: Any) -> str | None:
    """The one value; several are as good as none: which of them counts must not be a matter of taste."""
    values = [value for key, value in metadata if key == "authorization"]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else None


def _bounded(handler: Any, timeout_s: float) -> grpc.RpcMethodHandler[Any, Any]:
    """The same for a call with one message from the client, which has to come in time, and to be one.

    gRPC would wait for it as long as the call may take, and would call one that cannot be read a fault of ours.
    """
    assert not handler.request_streaming, "all calls of ours have one message from the client"

    async def read_first(_messages: object, context: Context) -> None:
        try:
            message = await _message(handler, context, timeout_s)
        except MullError as error:
            await abort(context, error, new_request_id())
        if handler.response_streaming:
            await handler.unary_stream(message, context)
        else:
            await context.write(await handler.unary_unary(message, context))

    return grpc.stream_stream_rpc_method_handler(read_first, None, handler.response_serializer)


async def _message(handler: Any, context: Context, timeout_s: float) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            data = await context.read()
    except TimeoutError:
        raise DeadlinePassed(f"no message within {timeout_s:g} s; send it with the call") from None
    if data is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in grpc-stubs
        raise InvalidRequest("message: missing; send one", field="message")
    try:
        return handler.request_deserializer(data)
    except DecodeError as error:
        raise InvalidRequest(
            f"message: cannot be read ({error}); send what the method takes", field="message"
        ) from error


def _refusal(error: MullError) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(_messages: object, context: Context) -> None:
        await abort(context, error, new_request_id())

    # A stream of messages, none of which is read.
    return grpc.stream_stream_rpc_method_handler(refuse)
