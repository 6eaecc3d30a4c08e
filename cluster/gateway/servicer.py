"""GenerationService: the client's calls, each a few lines over the core.

Hops 1 and 11. Writes the core's events as they come, and turns whatever ends a call into a status.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import grpc.aio

from cluster.gateway.access import Access
from cluster.gateway.core import GenerationCore, HeldEvents
from cluster.gateway.doorkeeper import caller_of
from cluster.gateway.requests import new_request_id
from cluster.gateway.status import abort
from cluster.tracing import HEADER
from mull.client.completion import CompletionBuilder
from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]
_Reply = TypeVar("_Reply")


class GenerationServicer(GenerationServiceServicer):
    """What clients talk to."""

    def __init__(self, core: GenerationCore, access: Access) -> None:
        self._core = core
        self._access = access

    async def Generate(  # type: ignore[override]  # written with context.write: a generator would not see the cancellation
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Stream the generations of a request."""
        try:
            caller = caller_of(context, self._access)
            stream = self._core.stream(request, caller, trace_parent=_trace_parent(context))
            async with aclosing(stream) as batches:
                async for events in batches:
                    for event in events:
                        await context.write(event)
        except Exception as error:
            await abort(context, error, request.request_id)

    async def Complete(self, request: pb.GenerateRequest, context: Context) -> pb.CompleteResponse:
        """All of it in one message."""
        builder = CompletionBuilder()
        try:
            caller = caller_of(context, self._access)
            stream = self._core.stream(request, caller, HeldEvents.REPEATED, trace_parent=_trace_parent(context))
            async with aclosing(stream) as batches:
                async for events in batches:
                    builder.add(events)
        except Exception as error:
            await abort(context, error, request.request_id)
        return builder.response()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Token ids of a text or a conversation."""
        return await _answered(lambda: self._core.tokenize(request, caller_of(context, self._access)), context)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        """The text of token ids."""
        return await _answered(lambda: self._core.detokenize(request, caller_of(context, self._access)), context)

    async def ListModels(self, _request: pb.ListModelsRequest, _context: Context) -> pb.ListModelsResponse:
        """The one model that this server has."""
        return self._core.list_models()

    async def GetServerInfo(self, _request: pb.GetServerInfoRequest, _context: Context) -> pb.GetServerInfoResponse:
        """How this server and its Router are now."""
        return await self._core.server_info()


def _trace_parent(context: Context) -> str | None:
    values = [value for key, value in context.invocation_metadata() or () if key == HEADER]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else None


async def _answered(reply: Callable[[], Awaitable[_Reply]], context: Context) -> _Reply:
    try:
        return await reply()
    except Exception as error:
        await abort(context, error, new_request_id())
