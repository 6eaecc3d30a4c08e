"""Lets gRPC calls in by their API key, before their message is read.

Hop 2 over gRPC. Health and reflection are open: they tell nothing of anyone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from cluster.errors import MullError
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
    """Ends calls without the key that they need."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        details = handler_call_details
        try:
            if details.method.startswith(_OURS):
                caller = self._access.caller(_authorization(details.invocation_metadata or ()))
                if details.method not in _ANY_KEY:
                    caller.check_scope(Scope.ADMIN if details.method.startswith(_ADMIN) else Scope.GENERATE)
        except MullError as error:
            return _refusal(error)
        return await continuation(details)


def _authorization(metadata: Any) -> str | None:
    """The one value; several are as good as none: which of them counts must not be a matter of taste."""
    values = [value for key, value in metadata if key == "authorization"]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else None


def _refusal(error: MullError) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(_messages: object, context: Context) -> None:
        await abort(context, error, new_request_id())

    # A stream of messages, none of which is read.
    return grpc.stream_stream_rpc_method_handler(refuse)
