"""Real ranks as processes on the built-in model: the same tokens however they start, errors that name the cause."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import NoReturn, cast

import pytest

from cluster.errors import RankLossCause, RankLost
from cluster.router.in_process import InProcessGroup
from cluster.router.launchers import ProcessLauncher
from cluster.router.shards import GroupBounds, RankGroup, ShardGroup
from tests.processes import ForkLauncher
from workers.config import RunnerConfig
from workers.layout import ParallelLayout
from workers.model import DecoderLayer
from workers.runner import ModelRunner
from workers.shard import Progress, Runner, ShardConfig, load_runner
from workers.step import OpenSlot, Prefill, RankLoading, SamplingParams, StepPlan

POCKET = Path(__file__).parents[2] / "deploy" / "models" / "pocket"
BOUNDS = GroupBounds(start_timeout_s=60, step_timeout_s=30)
PROMPT = [5, 6, 7, 8, 9]
NUM_TOKENS = 12


def configs(tp: int, model_dir: Path = POCKET, dp: int = 1) -> list[RunnerConfig]:
    return [
        RunnerConfig(
            model_dir=str(model_dir),
            rank=rank,
            layout=ParallelLayout(tp=tp, dp=dp),
            num_threads=1,
            max_model_len=256,
            kv_memory_bytes=2**22,
        )
        for rank in range(tp * dp)
    ]


def processes(tp: int, progress: list[RankLoading]) -> RankGroup:
    return RankGroup(ProcessLauncher(), configs(tp), BOUNDS, progress.append)


def forked(tp: int, model_dir: Path = POCKET) -> RankGroup:
    return RankGroup(ForkLauncher(), configs(tp, model_dir), BOUNDS, lambda _: None)


async def greedy_tokens(group: ShardGroup) -> list[int]:
    """Prefill in two chunks, then decode, each plan sent before the result of the one before it."""
    opened = OpenSlot(0, [1, 2], 0, SamplingParams(temperature=0, top_k=0, top_p=1))
    plans = [
        StepPlan(0, open=[opened], prefills=[Prefill(0, 0, PROMPT[:2], sample=False)]),
        StepPlan(1, prefills=[Prefill(0, 2, PROMPT[2:], sample=True)]),
        *(StepPlan(step, decodes=[0]) for step in range(2, NUM_TOKENS + 1)),
    ]
    token_ids: list[int] = []
    await group.start()
    try:
        group.send([plans[0]])
        for ahead in plans[1:]:
            group.send([ahead])
            token_ids += (await group.receive())[0].token_ids
        return token_ids + (await group.receive())[0].token_ids
    finally:
        await group.stop()


async def test_one_rank_two_ranks_and_a_thread_give_the_same_tokens() -> None:
    progress: list[RankLoading] = []

    in_thread = await greedy_tokens(InProcessGroup(configs(1)[0], BOUNDS, progress.append))
    one = await greedy_tokens(processes(1, []))
    two = await greedy_tokens(processes(2, progress))

    assert len(in_thread) == NUM_TOKENS
    assert in_thread == one == two
    assert {p.rank for p in progress if p.read_bytes == p.total_bytes > 0} == {0, 1}


async def test_a_rank_killed_in_the_group_is_blamed_and_not_the_one_that_missed_it() -> None:
    group = forked(2)
    info = await group.start()
    try:
        os.kill(info.ranks[1].pid, signal.SIGKILL)
        opened = OpenSlot(0, [1], 0, SamplingParams(temperature=0))
        group.send([StepPlan(0, open=[opened], prefills=[Prefill(0, 0, PROMPT, sample=True)])])

        with pytest.raises(RankLost, match="rank 1 was killed by SIGKILL"):
            await asyncio.wait_for(group.receive(), 60)
    finally:
        await group.stop()


class Hanging:
    """A layer."""

    def __call__(self, *_: object) -> NoReturn:
        threading.Event().wait()
        raise AssertionError("nothing sets it")


def load_and_hang(config: ShardConfig, progress: Progress, previous: Runner | None) -> Runner:
    """Rank 1 hangs in its second layer, once."""
    runner = load_runner(config, progress, previous)
    if config.runner.rank == 1 and previous is None:
        assert isinstance(runner, ModelRunner)
        runner.decoder.layers[1] = cast(DecoderLayer, Hanging())
    return runner


async def test_a_rank_that_hangs_in_a_step_is_told_from_its_group_and_from_one_that_was_idle() -> None:
    bounds = GroupBounds(start_timeout_s=60, step_timeout_s=5, wake_timeout_s=10, stop_timeout_s=1)
    group = RankGroup(ForkLauncher(load_and_hang), configs(2, dp=2), bounds, lambda _: None)
    await group.start()
    try:
        opened = OpenSlot(0, [1], 0, SamplingParams(temperature=0))
        busy = StepPlan(0, open=[opened], prefills=[Prefill(0, 0, PROMPT, sample=True)], group_tokens=[5, 0])
        group.send([busy, StepPlan(0, group_tokens=[5, 0])])

        with pytest.raises(RankLost, match=r"rank 1 was late: .* \(ranks 0, 2, 3 were waiting for it\)") as lost:
            await asyncio.wait_for(group.receive(), 60)
        assert (lost.value.rank, lost.value.cause) == (1, RankLossCause.LATE)
        assert sorted(await group.dissolve()) == [0, 2, 3]
    finally:
        await group.stop()


async def test_a_checkpoint_that_is_cut_short_is_told_naming_the_file(tmp_path: Path) -> None:
    model = shutil.copytree(POCKET, tmp_path / "model")
    shard = sorted(model.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size // 2)

    with pytest.raises(RankLost, match=shard.name) as lost:
        await forked(2, model).start()

    assert "\n" not in str(lost.value)
