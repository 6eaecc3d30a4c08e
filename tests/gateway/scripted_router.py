"""A RouterService that does what a test says: a real gRPC server, with no model behind it.

What gateways send is kept in order; the test answers with updates of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import grpc.aio

from mull.v1 import router_pb2 as pb
from mull.v1.router_pb2_grpc import RouterServiceServicer, add_RouterServiceServicer_to_server

WAIT_S = 60.0


@dataclass
class ScriptedSession:
    """One gateway's session, and what it has sent."""

    outbox: asyncio.Queue[pb.RouterMessage | None] = field(default_factory=asyncio.Queue)


class ScriptedRouter(RouterServiceServicer):
    """Start it, point a gateway at `address`, then wait for submits and send updates."""

    def __init__(self) -> None:
        self.description = pb.DescribeResponse(
            model="pocket", ready=True, max_model_len=4096, tensor_parallel_size=1, num_blocks=100, num_free_blocks=40,
            block_size=32, num_running=3, num_waiting=2,
        )  # fmt: skip
        self.address = ""
        self.submits: list[pb.Submit] = []
        self.cancelled_keys: list[int] = []
        self.budgets: list[tuple[int, int]] = []
        """Keys and thinking budgets, as they came."""
        self.answers = asyncio.Event()
        """Describe is answered once it is set."""
        self.answers.set()
        self.num_sessions = 0
        """How many came, the ended ones included."""
        self.on_submit: Callable[[pb.Submit], object] | None = None
        self._changed = asyncio.Condition()
        self._session: ScriptedSession | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> str:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_RouterServiceServicer_to_server(self, self._server)
        address = f"127.0.0.1:{port}"
        if credentials is None:
            bound_port = self._server.add_insecure_port(address)
        else:
            bound_port = self._server.add_secure_port(address, credentials)
        self.address = f"127.0.0.1:{bound_port}"
        await self._server.start()
        return self.address

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def Describe(self, _request: pb.DescribeRequest, _context: grpc.aio.ServicerContext) -> pb.DescribeResponse:
        await self.answers.wait()
        return self.description

    async def Session(
        self, requests: AsyncIterator[pb.GatewayMessage], _context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.RouterMessage]:
        session = self._session = ScriptedSession()
        self.num_sessions += 1
        reader = asyncio.create_task(self._read(requests))
        try:
            while (message := await session.outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()

    @property
    def has_session(self) -> bool:
        """A gateway's session has arrived; the gateway itself may know it as open before."""
        return self._session is not None

    def send(self, *updates: pb.SequenceUpdate) -> None:
        """One RouterMessage."""
        assert self._session is not None
        self._session.outbox.put_nowait(pb.RouterMessage(updates=updates))

    def end_session(self) -> None:
        assert self._session is not None
        self._session.outbox.put_nowait(None)

    async def submitted(self, count: int = 1) -> pb.Submit:
        """The last submit, once `count` have come."""
        await self._until(lambda: len(self.submits) >= count, f"{count} submits")
        return self.submits[-1]

    async def budgeted(self, count: int) -> None:
        await self._until(lambda: len(self.budgets) >= count, f"{count} budgets")

    async def cancelled(self, key: int) -> None:
        await self._until(lambda: key in self.cancelled_keys, f"a cancel of {key}")

    async def _read(self, requests: AsyncIterator[pb.GatewayMessage]) -> None:
        async for message in requests:
            async with self._changed:
                if message.HasField("submit"):
                    self.submits.append(message.submit)
                    if self.on_submit is not None:
                        self.on_submit(message.submit)
                elif message.HasField("set_budget"):
                    self.budgets.append((message.set_budget.key, message.set_budget.thinking_budget))
                else:
                    self.cancelled_keys.append(message.cancel.key)
                self._changed.notify_all()

    async def _until(self, condition: Callable[[], bool], what: str) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(condition), WAIT_S)
            except TimeoutError:
                raise AssertionError(f"waited {WAIT_S:g} s for {what}") from None


def update(
    key: int,
    token_ids: Sequence[int] = (),
    *,
    admitted: int | None = None,
    end: pb.End.Reason | None = None,
    message: str = "",
    num_forced: int = 0,
) -> pb.SequenceUpdate:
    """A SequenceUpdate; `admitted` is the number of cached tokens."""
    made = pb.SequenceUpdate(key=key, token_ids=token_ids, num_forced=num_forced)
    if admitted is not None:
        made.admitted.cached_tokens = admitted
    if end is not None:
        made.end.CopyFrom(pb.End(reason=end, message=message))
    return made
