"""A Router over several attention groups and a model with experts, as a gateway meets it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from cluster.router.balancer import ModelExperts, RebalancePolicy
from cluster.router.layout_table import RankRole
from cluster.router.router import Router
from mull.v1 import router_pb2 as pb
from tests.router.fake_group import FakeExperts
from tests.router.router_site import CONFIG, MODEL, NUM_BLOCKS, WAIT_S, Gateway, Groups, alone
from workers.placement_map import initial_placement

NUM_GROUPS = 2
NUM_RANKS = 2 * NUM_GROUPS
NUM_EXPERTS, NUM_REDUNDANT = 16, 4
SHARES = [[0.4, *[0.6 / (NUM_EXPERTS - 1)] * (NUM_EXPERTS - 1)], [1 / NUM_EXPERTS] * NUM_EXPERTS]
"""Layer 0 has a hot expert, layer 1 has none."""
ROLES = [RankRole(rank=rank, group=rank // 2, num_heads=4, num_kv_heads=1, num_experts=5) for rank in range(NUM_RANKS)]


@pytest.fixture
def groups() -> Groups:
    experts = FakeExperts(SHARES, initial_placement(NUM_EXPERTS, NUM_REDUNDANT, NUM_RANKS))
    return Groups(dp=NUM_GROUPS, experts=experts)


@pytest.fixture
async def router(groups: Groups) -> AsyncIterator[Router]:
    experts = ModelExperts(num_experts=NUM_EXPERTS, num_layers=len(SHARES), num_redundant=NUM_REDUNDANT)
    router = Router(
        replace(MODEL, experts=experts),
        CONFIG,
        groups,
        roles=ROLES,
        rebalance=RebalancePolicy(interval_steps=20, min_tokens_per_expert=1),
    )
    await router.start()
    yield router
    await router.stop()


@pytest.fixture
async def gateway(router: Router) -> AsyncIterator[Gateway]:
    await asyncio.wait_for(router.wait_ready(), WAIT_S)
    gateway = Gateway(router.address)
    yield gateway
    await gateway.channel.close()


async def test_requests_of_all_groups_get_the_tokens_that_they_get_alone(router: Router, gateway: Gateway) -> None:
    messages = [await gateway.submit(key, prompt_ids=[key, *range(key)], max_tokens=40) for key in range(1, 30)]

    for message in messages:
        await gateway.end_of(message.key)
        assert gateway.tokens(message.key) == alone(message)

    described = router.describe()
    assert described.num_free_blocks == described.num_blocks == NUM_GROUPS * NUM_BLOCKS


async def test_both_groups_run_at_once(router: Router, groups: Groups, gateway: Gateway) -> None:
    await gateway.begin(groups.made[0], *range(1, 2 * CONFIG.max_num_seqs + 1), max_tokens=390)

    assert router.describe().num_running == 2 * CONFIG.max_num_seqs


async def test_experts_are_placed_anew_while_streams_go_on(router: Router, groups: Groups, gateway: Gateway) -> None:
    experts = groups.experts
    assert experts is not None
    first = initial_placement(NUM_EXPERTS, NUM_REDUNDANT, NUM_RANKS)
    keys = range(1, 7)
    messages = [await gateway.submit(key, max_tokens=390) for key in keys]

    for message in messages:
        await gateway.end_of(message.key)
        assert gateway.tokens(message.key) == alone(message)

    described = router.describe()
    assert experts.versions == list(range(1, described.num_rebalances_total + 1))
    assert experts.versions[0] == 1
    assert experts.placement[0] != first
    assert described.expert_imbalance < 1.2
    assert max(router.stats().expert_imbalances.values()) >= described.expert_imbalance


async def test_describe_tells_the_layout(gateway: Gateway) -> None:
    described = await gateway.stub.Describe(pb.DescribeRequest())

    sizes = (described.tensor_parallel_size, described.data_parallel_size, described.expert_parallel_size)
    assert sizes == (2, NUM_GROUPS, NUM_RANKS)
    assert described.redundant_experts == NUM_REDUNDANT
    assert [rank.group for rank in described.ranks] == [0, 0, 1, 1]
    assert {(rank.num_heads, rank.num_kv_heads, rank.num_experts) for rank in described.ranks} == {(4, 1, 5)}
    assert {rank.kv_tokens for rank in described.ranks} == {NUM_BLOCKS * described.block_size}


async def test_losing_a_rank_starts_all_groups_again(groups: Groups, gateway: Gateway) -> None:
    messages = await gateway.begin(groups.made[0], *range(10, 16), max_tokens=80)

    groups.made[0].lose_rank("rank 3 was killed by SIGKILL")

    for message in messages:
        await gateway.end_of(message.key)
        assert gateway.tokens(message.key) == alone(message)
    assert len(groups.made) == 2
    message = await gateway.submit(2)
    await gateway.end_of(2)
    assert gateway.tokens(2) == alone(message)
