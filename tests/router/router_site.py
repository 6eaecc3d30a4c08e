"""A Router on a real gRPC server, over ranks that check every plan; and a gateway's end of a session with it."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import grpc

from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import SequenceRequest
from cluster.router.shards import OnProgress, Survivors
from cluster.router.wire import ModelInfo, to_request
from mull.v1 import router_pb2 as pb
from mull.v1.router_pb2_grpc import RouterServiceStub
from tests.fakes import FakeRanks, generate_alone
from tests.router.fake_group import BLOCK_SIZE, FakeExperts, FakeShardGroup

CONFIG = SchedulerConfig(max_model_len=400, max_num_seqs=8, max_num_batched_tokens=64, max_waiting=40)
MODEL = ModelInfo(name="fake", vocab_size=50, max_model_len=CONFIG.max_model_len, think_end_id=3)
NUM_BLOCKS = 300
THINK_END = 3
REGEX = pb.Grammar(kind=pb.Grammar.KIND_REGEX, text="[0-9]")
WAIT_S = 60.0
MAX_UNREAD = 20_000
KEY_OF_NOBODY = 2**31


@dataclass
class Groups:
    """Makes the groups of a Router; each start takes the next of `start_errors`."""

    start_errors: list[str | None] = field(default_factory=list)
    made: list[FakeShardGroup] = field(default_factory=list)
    dp: int = 1
    experts: FakeExperts | None = None
    deadly_token: int | None = None
    may_start: asyncio.Event = field(default_factory=asyncio.Event)
    """Until it is set no group comes up; it is set from the beginning."""

    def __post_init__(self) -> None:
        self.may_start.set()

    def __call__(self, on_progress: OnProgress, _survivors: Survivors) -> FakeShardGroup:
        ranks = [
            FakeRanks(
                num_blocks=NUM_BLOCKS,
                block_size=BLOCK_SIZE,
                max_num_seqs=CONFIG.max_num_seqs,
                max_num_batched_tokens=CONFIG.max_num_batched_tokens,
                vocab_size=MODEL.vocab_size,
                group=group,
            )
            for group in range(self.dp)
        ]
        error = self.start_errors.pop(0) if self.start_errors else None
        self.made.append(FakeShardGroup(ranks, on_progress, error, self.experts))
        self.made[-1].deadly_token = self.deadly_token
        self.made[-1].may_start = self.may_start
        return self.made[-1]


class Gateway:
    """One session, and what it got for each key."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.aio.insecure_channel(address)
        self.stub = RouterServiceStub(self.channel)
        self.call = self.stub.Session()
        self.num_messages = 0
        self.updates: dict[int, list[pb.SequenceUpdate]] = defaultdict(list)

    async def begin(self, group: FakeShardGroup, *keys: int, num_steps: int = 30, **fields: object) -> list[pb.Submit]:
        """Submit requests that have begun after so many steps, and stand still in the middle of their outputs."""
        group.hold()
        messages = [await self.submit(key, **fields) for key in keys]
        # Messages are taken in order: once this is refused, all the others are in the queue.
        await self.submit(KEY_OF_NOBODY, prompt_ids=[])
        await self.end_of(KEY_OF_NOBODY)
        group.release(num_steps)
        while not all(self.tokens(key) for key in keys):
            await self.read()
        return messages

    async def submit(self, key: int, **fields: object) -> pb.Submit:
        message = submit(key, **fields)
        await self.call.write(pb.GatewayMessage(submit=message))
        return message

    async def cancel(self, key: int) -> None:
        await self.call.write(pb.GatewayMessage(cancel=pb.Cancel(key=key)))

    async def read(self) -> None:
        message = await asyncio.wait_for(self.call.read(), WAIT_S)
        assert message is not grpc.aio.EOF, f"the session ended: {await self.call.details()}"
        self.num_messages += 1
        for update in message.updates:
            self.updates[update.key].append(update)

    async def end_of(self, key: int) -> pb.End:
        while not (self.updates[key] and self.updates[key][-1].HasField("end")):
            await self.read()
        return self.updates[key][-1].end

    def tokens(self, key: int) -> list[int]:
        return [token_id for update in self.updates[key] for token_id in update.token_ids]


Connect = Callable[[], Awaitable[Gateway]]


def submit(key: int, **fields: object) -> pb.Submit:
    sampling = pb.RouterSampling(temperature=0.6, top_p=0.95, repetition_penalty=1, seed=key)
    values: dict[str, object] = {"prompt_ids": [1, 2, 3], "max_tokens": 20, "sampling": sampling} | fields
    return pb.Submit(key=key, **values)


def alone(message: pb.Submit) -> list[int]:
    request: SequenceRequest = to_request(message, 0, MODEL)
    return generate_alone(request, context_limit=CONFIG.max_model_len, vocab_size=MODEL.vocab_size)[0]


async def until(condition: Callable[[], bool], what: str) -> None:
    """The Router's tasks share this loop, so giving them turns is enough; bounded."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110  # the product has no event for what tests ask
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"waited {WAIT_S:g} s for {what}") from None
