"""Real ranks of the built-in model, killed and stopped in the middle of streams: nobody sees more than a pause."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import ClusterConfig, EngineConfig, ModelSource, RouterConfig
from cluster.router.deployment import group_factory
from cluster.router.engine import Engine
from cluster.router.launchers import ProcessLauncher
from cluster.router.scheduler import SchedulerConfig
from cluster.router.sequence import FinishReason, SequenceRequest, SequenceUpdate
from cluster.text.tokenizer import Tokenizer
from workers.step import Grammar, SamplingParams, TokenLogprobs

pytestmark = pytest.mark.timeout(180)

POCKET = Path(__file__).parents[2] / "deploy" / "models" / "pocket"
CONTEXT = 1024
WAIT_S = 60.0
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


class Streams:
    """An engine with two ranks, and what its sequences got."""

    def __init__(self, *, step_timeout_s: float = 60.0) -> None:
        self.token_ids: dict[object, list[int]] = {key: [] for key in requests()}
        self.logprobs: dict[object, list[TokenLogprobs]] = {key: [] for key in requests()}
        self.finish: dict[object, FinishReason] = {}
        self.ended: str | None = None
        config = ClusterConfig(
            model=ModelSource(path=POCKET, name="pocket"),
            engine=EngineConfig(tp=2, threads_per_rank=1, kv_memory_bytes=2**24, device="cpu"),
            router=RouterConfig(step_timeout_s=step_timeout_s),
        )
        scheduler = SchedulerConfig(max_model_len=CONTEXT, max_num_seqs=8, max_num_batched_tokens=64)
        make_group = group_factory(config, CONTEXT, "cpu", ProcessLauncher())
        self.engine = Engine(scheduler, make_group, on_updates=self._take, on_ended=self._end)

    def _take(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            self.token_ids[update.key] += update.token_ids
            self.logprobs[update.key] += update.logprobs
            if update.finish is not None:
                self.finish[update.key] = update.finish

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
        for request in requests().values():
            self.engine.add(request)

    async def finished(self) -> None:
        await self.until(lambda: len(self.finish) == len(self.token_ids), "the ends of all streams")

    def pids(self) -> list[int]:
        assert self.engine.info is not None
        return [rank.pid for rank in self.engine.info.ranks]


@pytest.fixture(scope="module")
def undisturbed() -> Streams:
    streams = Streams()

    async def run() -> None:
        await streams.start()
        await streams.finished()
        await streams.engine.stop()

    asyncio.run(run())
    return streams


def assert_same(streams: Streams, undisturbed: Streams) -> None:
    assert streams.token_ids == undisturbed.token_ids
    assert streams.finish == undisturbed.finish
    for key, expected in undisturbed.logprobs.items():
        got = streams.logprobs[key]
        assert [entry.logprob for entry in got] == pytest.approx([entry.logprob for entry in expected], abs=1e-3)


async def test_streams_outlive_killed_ranks_token_for_token(undisturbed: Streams) -> None:
    streams = Streams()
    await streams.start()
    for victim in (1, 0):
        num_before = len(streams.token_ids["penalised"])
        await streams.until(lambda n=num_before: len(streams.token_ids["penalised"]) >= n + 30, "some tokens")
        before = streams.pids()

        os.kill(before[victim], signal.SIGKILL)

        await streams.until(lambda: streams.engine.info is None, "the loss")
        await streams.until(lambda: streams.engine.info is not None, "new ranks")
        kept = [old == new for old, new in zip(before, streams.pids(), strict=True)]
        assert kept == [rank != victim for rank in range(2)], "who survived keeps its process and its weights"
    await streams.finished()
    await streams.engine.stop()

    assert_same(streams, undisturbed)
    assert streams.engine.core.num_replayed_tokens_total > 0


async def test_a_rank_that_hangs_is_named_and_replaced(undisturbed: Streams) -> None:
    streams = Streams(step_timeout_s=4.0)
    await streams.start()
    await streams.until(lambda: len(streams.token_ids["penalised"]) >= 30, "some tokens")
    before = streams.pids()

    os.kill(before[1], signal.SIGSTOP)

    await streams.until(lambda: streams.engine.info is None, "the loss")
    assert "rank 1 was late" in streams.engine.core.reason
    await streams.finished()
    after = streams.pids()
    await streams.engine.stop()
    assert (after[0], after[1] != before[1]) == (before[0], True)
    assert_same(streams, undisturbed)
