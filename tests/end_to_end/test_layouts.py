"""Engines of every layout, with real ranks: the same tokens, in chunks, preempted, and while experts move."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.config import ClusterConfig, EngineConfig, ModelSource, RouterConfig
from cluster.offline import OfflineConfig, OfflineEngine
from cluster.router.assembly import group_factory, model_info
from cluster.router.balancer import ExpertBalancer, RebalancePolicy, make_balancer
from cluster.router.engine import Engine
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import SequenceRequest, SequenceUpdate
from cluster.router.shard_group import GroupInfo
from tests.processes import ForkLauncher
from workers.step import SamplingParams

pytestmark = pytest.mark.timeout(300)

POCKET = Path(__file__).parents[2] / "deploy" / "models" / "pocket"
PROMPTS = [[5 + (7 * index + place) % 200 for place in range(3 + 5 * index)] for index in range(7)]
SAMPLING = [SamplingParams(temperature=0.8 * (index % 2), seed=index) for index in range(len(PROMPTS))]
NUM_TOKENS = 24
START_S, RUN_S = 120.0, 120.0
CONTEXT = 128
BLOCK_SIZE, POOL_TOKENS = 8, 80
"""A group's KV holds one of its two sequences to the end, but not both."""
KV_HEAD_BYTES = 2 * 4 * 128 * 4
"""Of a token: K and V, layers, head size, fp32."""
REBALANCE = RebalancePolicy(interval_steps=5, threshold=1.0, min_gain=0.0, min_tokens_per_expert=1)


@dataclass
class Ran:
    """What an engine gave, and how often it placed experts anew and took blocks away."""

    token_ids: dict[Hashable, list[int]] = field(default_factory=dict)
    num_rebalances: int = 0
    num_preempted: int = 0


async def run(engine_config: EngineConfig) -> Ran:
    """All prompts at once on ranks of this layout."""
    config = ClusterConfig(
        model=ModelSource(path=POCKET, name="pocket"),
        engine=engine_config,
        router=RouterConfig(start_timeout_s=START_S),
    )
    model, ran, ended = model_info(config), Ran({key: [] for key in range(len(PROMPTS))}), asyncio.Event()
    live = set(ran.token_ids)

    def take(updates: list[SequenceUpdate]) -> None:
        for update in updates:
            ran.token_ids[update.key] += update.token_ids
            if update.finish is not None:
                live.remove(update.key)
        if not live:
            ended.set()

    def balancer(info: GroupInfo) -> ExpertBalancer | None:
        return make_balancer(model.experts, info.layout, [rank.host for rank in info.ranks], REBALANCE)

    engine = Engine(
        SchedulerConfig(max_model_len=CONTEXT, max_num_seqs=2, max_num_batched_tokens=16),
        group_factory(config, CONTEXT, "cpu", ForkLauncher()),
        on_updates=take,
        on_ended=lambda reason: pytest.fail(f"the engine ended: {reason}"),
        make_balancer=balancer,
    )
    engine.start()
    try:
        await asyncio.wait_for(engine.wait_settled(), START_S)
        for key, (prompt_ids, sampling) in enumerate(zip(PROMPTS, SAMPLING, strict=True)):
            engine.add(SequenceRequest(key=key, prompt_ids=prompt_ids, sampling=sampling, max_tokens=NUM_TOKENS))
        await asyncio.wait_for(ended.wait(), RUN_S)
        ran.num_rebalances = engine.balancer.num_rebalances_total if engine.balancer else 0
        ran.num_preempted = engine.core.stats.num_preempted_total if engine.core.stats else 0
    finally:
        await engine.stop()
    assert engine.core.num_restarts_total == 0
    return ran


@pytest.fixture(scope="module")
def alone() -> dict[Hashable, list[int]]:
    """Each prompt alone on one rank."""
    engine = OfflineEngine(OfflineConfig(model_dir=str(POCKET), num_threads=1, max_model_len=CONTEXT))
    return {
        key: engine.generate([prompt_ids], NUM_TOKENS, sampling)[0]
        for key, (prompt_ids, sampling) in enumerate(zip(PROMPTS, SAMPLING, strict=True))
    }


@pytest.mark.parametrize(("tp", "dp", "redundant"), [(1, 2, 0), (2, 2, 4), (1, 3, 2), (2, 1, 2)])
async def test_every_layout_gives_the_tokens_of_one_rank(
    alone: dict[Hashable, list[int]], tp: int, dp: int, redundant: int
) -> None:
    engine = EngineConfig(
        tp=tp,
        dp=dp,
        redundant_experts=redundant,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        block_size=BLOCK_SIZE,
        kv_memory_bytes=POOL_TOKENS * KV_HEAD_BYTES * 2 // tp,
        threads_per_rank=1,
        device="cpu",
    )

    ran = await run(engine)

    assert ran.token_ids == alone
    assert ran.num_rebalances > 0, "experts should have moved meanwhile"
    assert ran.num_preempted > 0, "sequences should have lost their blocks meanwhile"
