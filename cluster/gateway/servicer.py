"""GenerationService: the client's calls, each a few lines over the core.

Hops 1 and 11. Checks the request, submits it, writes the events as they come, and turns whatever ends it into a status.
A handler that stops, for whatever reason, releases its request: the Router frees its blocks before the next plan.
"""

from __future__ import annotations

import time
from contextlib import aclosing
from importlib.metadata import version
from typing import Any

import grpc.aio

from cluster.gateway.core import DRAINING, GenerationCore
from cluster.gateway.requests import new_request_id
from cluster.gateway.router_link import RouterLink
from cluster.gateway.sampling_options import default_options
from cluster.gateway.status import abort
from mull.v1 import generation_pb2 as pb
from mull.v1.generation_pb2_grpc import GenerationServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationServicer(GenerationServiceServicer):
    """What clients talk to."""

    def __init__(self, core: GenerationCore, link: RouterLink) -> None:
        self.http_port = 0
        """Where this server answers HTTP, for GetServerInfo."""
        self._core = core
        self._link = link
        self._start_s = time.monotonic()

    async def Generate(  # type: ignore[override]  # written with context.write: a generator would not see the cancellation
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Stream one generation."""
        request_id = request.request_id = request.request_id or new_request_id()
        try:
            async with aclosing(self._core.stream(request)) as batches:
                async for events in batches:
                    for event in events:
                        await context.write(event)
        except Exception as error:
            await abort(context, error, request_id)

    async def ListModels(self, _request: pb.ListModelsRequest, _context: Context) -> pb.ListModelsResponse:
        """The one model that this server has."""
        model = self._core.model
        listed = pb.Model(
            name=model.name,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            defaults=default_options(model.defaults),
        )
        return pb.ListModelsResponse(models=[listed])

    async def GetServerInfo(self, _request: pb.GetServerInfoRequest, _context: Context) -> pb.GetServerInfoResponse:
        """How this server and its Router are now."""
        state = await self._link.describe()
        return pb.GetServerInfoResponse(
            version=version("mull"),
            ready=state.ready and not self._core.is_draining,
            reason=DRAINING if self._core.is_draining else state.reason,
            uptime_seconds=time.monotonic() - self._start_s,
            num_streams=self._core.num_streams,
            http_port=self.http_port,
            routers=[state.description] if state.description is not None else [],
        )
