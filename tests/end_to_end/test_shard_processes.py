"""Real ranks as processes on the built-in model: the same tokens however they start, errors that name the cause."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

import pytest

from cluster.errors import RankLost
from cluster.router.in_process import InProcessGroup
from cluster.router.launchers import ProcessLauncher
from cluster.router.shards import GroupBounds, RankGroup, ShardGroup
from workers.config import RunnerConfig
from workers.layout import ParallelLayout
from workers.step import OpenSlot, Prefill, RankLoading, SamplingParams, StepPlan

POCKET = Path(__file__).parents[2] / "deploy" / "models" / "pocket"
BOUNDS = GroupBounds(start_timeout_s=60, step_timeout_s=30)
PROMPT = [5, 6, 7, 8, 9]
NUM_TOKENS = 12


def configs(tp: int, model_dir: Path = POCKET) -> list[RunnerConfig]:
    return [
        RunnerConfig(
            model_dir=str(model_dir),
            rank=rank,
            layout=ParallelLayout(tp=tp),
            num_threads=1,
            max_model_len=256,
            kv_memory_bytes=2**22,
        )
        for rank in range(tp)
    ]


def processes(tp: int, model_dir: Path = POCKET, progress: list[RankLoading] | None = None) -> RankGroup:
    seen = progress if progress is not None else []
    return RankGroup(ProcessLauncher(), configs(tp, model_dir), BOUNDS, seen.append)


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
    one = await greedy_tokens(processes(1))
    two = await greedy_tokens(processes(2, progress=progress))

    assert len(in_thread) == NUM_TOKENS
    assert in_thread == one == two
    assert {p.rank for p in progress if p.read_bytes == p.total_bytes > 0} == {0, 1}


async def test_a_rank_killed_in_the_group_is_blamed_and_not_the_one_that_missed_it() -> None:
    group = processes(2)
    info = await group.start()
    try:
        os.kill(info.ranks[1].pid, signal.SIGKILL)
        opened = OpenSlot(0, [1], 0, SamplingParams(temperature=0))
        group.send([StepPlan(0, open=[opened], prefills=[Prefill(0, 0, PROMPT, sample=True)])])

        with pytest.raises(RankLost, match="rank 1 was killed by SIGKILL"):
            await asyncio.wait_for(group.receive(), 20)
    finally:
        await group.stop()


async def test_a_checkpoint_that_is_cut_short_is_told_naming_the_file(tmp_path: Path) -> None:
    model = shutil.copytree(POCKET, tmp_path / "model")
    shard = sorted(model.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size // 2)

    with pytest.raises(RankLost, match=shard.name) as lost:
        await processes(2, model).start()

    assert "\n" not in str(lost.value)
