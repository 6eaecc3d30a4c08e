"""Real ranks of the built-in model, killed and stopped in the middle of streams: nobody sees more than a pause."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cluster.config import ClusterConfig, EngineConfig, ModelSource, RouterConfig
from cluster.router.assembly import group_factory
from cluster.router.engine import Engine
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import FinishReason, SequenceRequest, SequenceUpdate
from cluster.text.tokenizer import Tokenizer
from tests.processes import ForkLauncher
from workers.step import Grammar, SamplingParams, TokenLogprobs

pytestmark = pytest.mark.timeout(300)

POCKET = Path(__file__).parents[2] / "deploy" / "models" / "pocket"
CONTEXT = 1024
WAIT_S = 120.0
SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}, "required": ["n", "s"]}'
ASK = "What is 347 + 285?"


def requests() -> dict[str, SequenceRequest]:
    """Of everything that a stream has to remember, one."""
    tokenizer = Tokenizer.from_dir(POCKET)
    prompt = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": ASK}]))
    think_end = tokenizer.token_id("</think>")
    assert think_end is not None
    greedy = SamplingParams(temperature=0.0, top_k=0, top_p=1.0)
    plain = SequenceRequest(key="greedy", prompt_ids=prompt, sampling=greedy, max_tokens=300, think_end_id=think_end)
    sampled = SamplingParams(temperature=1.0, seed=7, num_logprobs=2)
    penalised = SamplingParams(temperature=0.8, seed=8, presence_penalty=0.5, repetition_penalty=1.1)
    return {
        request.key: request
        for request in (
            plain,
            replace(plain, key="sampled, with logprobs", sampling=sampled),
            replace(plain, key="penalised", sampling=penalised),
            replace(
                plain, key="with a budget", starts_thinking=True, thinking_budget=40, close_thinking_ids=[think_end]
            ),
            replace(plain, key="with a grammar", grammar=Grammar("json_schema", SCHEMA), stop_token_ids=frozenset({0})),
            replace(plain, key="with bad words", bad_words=[[prompt[3], prompt[4]], [9]], min_tokens=20),
        )
    }


@dataclass
class Ran:
    """What the streams gave in one run."""

    token_ids: dict[object, list[int]]
    logprobs: dict[object, list[TokenLogprobs]]
    finish: dict[object, FinishReason]


class Streams:
    """An engine with two ranks, and what its sequences got."""

    def __init__(self, *, step_timeout_s: float) -> None:
        self.ran = Ran({}, {}, {})
        self.ended: str | None = None
        config = ClusterConfig(
            model=ModelSource(path=POCKET, name="pocket"),
            # 16 blocks, for a quarter of what is asked of them.
            engine=EngineConfig(tp=2, threads_per_rank=1, kv_memory_bytes=2**21, host_kv_bytes=2**24, device="cpu"),
            router=RouterConfig(step_timeout_s=step_timeout_s),
        )
        scheduler = SchedulerConfig(max_model_len=CONTEXT, max_num_seqs=8, max_num_batched_tokens=64)
        make_group = group_factory(config, CONTEXT, "cpu", ForkLauncher())
        self.engine = Engine(scheduler, make_group, on_updates=self._take, on_ended=self._end)

    def _take(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            self.ran.token_ids[update.key] += update.token_ids
            self.ran.logprobs[update.key] += update.logprobs
            if update.finish is not None:
                self.ran.finish[update.key] = update.finish

    def _end(self, reason: str) -> None:
        self.ended = reason

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                assert self.ended is None, f"it ended while waiting for {what}: {self.ended}"
                await asyncio.sleep(0.01)

    async def start(self) -> None:
        self.engine.start()
        await self.until(lambda: self.engine.info is not None, "ranks")

    async def run(self, *disturbances: Callable[[], Awaitable[None]]) -> Ran:
        """All requests to their ends, each disturbance after some more tokens."""
        asked = requests()
        self.ran = Ran({key: [] for key in asked}, {key: [] for key in asked}, {})
        for request in asked.values():
            self.engine.add(request)
        for disturb in disturbances:
            wanted = len(self.ran.token_ids["penalised"]) + 30
            await self.until(lambda wanted=wanted: len(self.ran.token_ids["penalised"]) >= wanted, "some tokens")
            await disturb()
        await self.until(lambda: len(self.ran.finish) == len(asked), "the ends of all streams")
        return self.ran

    @property
    def num_preempted(self) -> int:
        stats = self.engine.core.stats
        assert stats is not None
        return stats.num_preempted_total

    def pids(self) -> list[int]:
        assert self.engine.info is not None
        return [rank.pid for rank in self.engine.info.ranks]


def assert_same(ran: Ran, undisturbed: Ran) -> None:
    assert ran.token_ids == undisturbed.token_ids
    assert ran.finish == undisturbed.finish
    for key, expected in undisturbed.logprobs.items():
        got = ran.logprobs[key]
        assert [entry.logprob for entry in got] == pytest.approx([entry.logprob for entry in expected], abs=1e-3)


async def test_streams_outlive_killed_and_hanging_ranks_token_for_token() -> None:
    streams = Streams(step_timeout_s=5.0)
    await streams.start()
    try:
        undisturbed = await streams.run()
        assert streams.num_preempted > 0, "there is room for all: nothing goes to the host's memory and comes back"
        killed = await streams.run(lambda: kill(streams, 1), lambda: kill(streams, 0))
        hung = await streams.run(lambda: hang(streams, 1))
    finally:
        await streams.engine.stop()

    assert_same(killed, undisturbed)
    assert_same(hung, undisturbed)
    assert streams.engine.core.num_replayed_tokens_total > 0


async def kill(streams: Streams, victim: int) -> None:
    await replace_rank(streams, victim, signal.SIGKILL)


async def hang(streams: Streams, victim: int) -> None:
    await replace_rank(streams, victim, signal.SIGSTOP)


async def replace_rank(streams: Streams, victim: int, number: signal.Signals) -> None:
    """Signal a rank; who survived keeps its process and its weights."""
    before = streams.pids()
    os.kill(before[victim], number)
    await streams.until(lambda: streams.engine.info is None, "the loss")
    assert f"rank {victim} was" in streams.engine.core.reason
    await streams.until(lambda: streams.engine.info is not None, "new ranks")
    kept = [old == new for old, new in zip(before, streams.pids(), strict=True)]
    assert kept == [rank != victim for rank in range(2)]
