"""RouterService on grpc.aio: moves messages between a gateway's stream and its session, nothing else.

Hop 4. What a message means is `router.py`'s business; which call ends how is decided here.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import grpc

from cluster.errors import EngineError, SlowReader
from cluster.router.session import Session
from mull.v1 import router_pb2 as pb
from mull.v1 import router_pb2_grpc

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[pb.GatewayMessage, pb.RouterMessage]


class SessionHost(Protocol):
    """What the servicer needs of a Router."""

    def open_session(self) -> Session: ...
    def close_session(self, session: Session) -> None: ...
    def take(self, session: Session, message: pb.GatewayMessage) -> None: ...
    def describe(self) -> pb.DescribeResponse: ...


class RouterServicer(router_pb2_grpc.RouterServiceServicer):
    """One per Router."""

    def __init__(self, router: SessionHost) -> None:
        self._router = router

    async def Describe(self, request: pb.DescribeRequest, context: object) -> pb.DescribeResponse:
        del request, context
        return self._router.describe()

    # Reads and writes by itself instead of being a generator: a cancelled call then ends here and now, not when the
    # generator is collected. The stubs know only generators.
    async def Session(self, request_iterator: object, context: Context) -> None:  # type: ignore[override]  # read and written by context
        del request_iterator
        session = self._router.open_session()
        tasks = [
            asyncio.create_task(_read(self._router, session, context)),
            asyncio.create_task(_write(session, context)),
            asyncio.create_task(_raise_when_broken(session)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._router.close_session(session)
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in outcomes:
            await _abort(context, outcome)


async def _read(router: SessionHost, session: Session, context: Context) -> None:
    while (message := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in grpc-stubs
        router.take(session, message)


async def _write(session: Session, context: Context) -> None:
    while True:
        await context.write(await session.next())


async def _raise_when_broken(session: Session) -> None:
    raise await session.wait_broken()


async def _abort(context: Context, outcome: object) -> None:
    """A gateway that broke the protocol or did not read is told so; one that left needs no answer."""
    match outcome:
        case EngineError():
            log.error("closed a gateway's session: %s", outcome)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(outcome))
        case SlowReader():
            log.error("closed a gateway's session: %s", outcome)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(outcome))
        case Exception():
            raise outcome
