"""A Router that loses its ranks, as its gateways meet it: who goes on, who is given up, and when it gives up itself."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import EngineError
from cluster.router.router import Router
from cluster.router.shards import OnProgress, Survivors
from mull.v1 import router_pb2 as pb
from tests.router.fake_group import FakeShardGroup
from tests.router.router_site import CONFIG, MODEL, WAIT_S, Connect, Groups, alone, submit, until


async def test_live_requests_outlive_the_ranks_that_computed_them(groups: Groups, connect: Connect) -> None:
    gateway = await connect()
    messages = await gateway.begin(groups.made[0], 1, 2, 3, max_tokens=100)
    while len(gateway.tokens(3)) < 20:
        await gateway.read()

    groups.made[0].lose_rank()

    for key, message in zip((1, 2, 3), messages, strict=True):
        assert (await gateway.end_of(key)).reason == pb.End.REASON_LENGTH
        assert gateway.tokens(key) == alone(message)
        assert sum(update.HasField("admitted") for update in gateway.updates[key]) == 1
    described = await gateway.stub.Describe(pb.DescribeRequest())
    assert (groups.made[0].num_stops, described.num_restarts_total) == (1, 1)
    assert described.num_replayed_tokens_total > 60


async def test_a_request_that_brings_down_its_ranks_twice_is_given_up_and_the_others_go_on(
    router: Router, groups: Groups, connect: Connect
) -> None:
    # given: ranks that fail whenever they compute a certain token, which is in one prompt alone
    gateway = await connect()
    good = {key: submit(key, max_tokens=20, prompt_ids=[key, 5]) for key in (1, 2, 3)}
    innocent = {token for message in good.values() for token in [*message.prompt_ids, *alone(message)]}
    groups.deadly_token = groups.made[0].deadly_token = next(t for t in range(4, 50) if t not in innocent)
    # when
    for message in good.values():
        await gateway.call.write(pb.GatewayMessage(submit=message))
    await gateway.submit(9, prompt_ids=[4, groups.deadly_token, 4], max_tokens=60)
    end = await gateway.end_of(9)
    # then
    assert end.reason == pb.End.REASON_ERROR
    assert "do not send it again" in end.message
    for key, message in good.items():
        await gateway.end_of(key)
        assert gateway.tokens(key) == alone(message)
    # Where the others had ended before, its end comes sooner than the next ranks.
    await until(lambda: len(groups.made) == 3, "ranks to start once more")
    assert router.describe().num_quarantined_total == 1


async def test_while_ranks_start_again_only_those_who_have_begun_are_taken(
    router: Router, groups: Groups, connect: Connect
) -> None:
    gateway = await connect()
    whole = alone(submit(1, max_tokens=50))
    groups.may_start.clear()
    groups.made[0].lose_rank()
    await until(lambda: not router.is_ready, "the loss")

    await gateway.submit(1, max_tokens=50, output_ids=whole[:20])
    await gateway.submit(2, max_tokens=50)

    assert (await gateway.end_of(2)).reason == pb.End.REASON_UNAVAILABLE
    groups.may_start.set()
    assert (await gateway.end_of(1)).reason == pb.End.REASON_LENGTH
    assert gateway.tokens(1) == whole[20:]


async def test_a_group_that_gives_no_sign_of_life_is_not_ready(
    router: Router, groups: Groups, connect: Connect
) -> None:
    gateway = await connect()

    groups.made[0].silence_s = 500.0

    described = await gateway.stub.Describe(pb.DescribeRequest())
    assert (described.ready, described.heartbeat_age_seconds) == (False, 500.0)
    assert "no sign of life came for 500 s, at most 120" in described.reason
    assert router.why_not_live == described.reason


async def test_a_rank_lost_while_idle_is_noticed(router: Router, groups: Groups, connect: Connect) -> None:
    await connect()

    groups.made[0].lose_rank()

    await until(lambda: len(groups.made) == 2 and router.is_ready, "the next group")


async def test_the_router_gives_up_when_a_group_does_not_come_back(
    router: Router, groups: Groups, connect: Connect
) -> None:
    gateway = await connect()
    groups.start_errors = ["rank 0 failed: no memory"] * 3

    groups.made[0].lose_rank()
    reason = await asyncio.wait_for(router.wait_failed(), WAIT_S)

    assert reason == "rank 0 failed: no memory"
    described = await gateway.stub.Describe(pb.DescribeRequest())
    assert (described.ready, described.failed, described.reason) == (False, True, reason)
    await gateway.submit(1)
    assert (await gateway.end_of(1)).reason == pb.End.REASON_UNAVAILABLE
    assert len(groups.made) == 4


async def test_a_first_start_that_fails_is_told_in_the_ranks_own_words() -> None:
    groups = Groups([error := "rank 1 failed: /models/x/config.json is missing; download it"])
    router = Router(MODEL, CONFIG, groups)

    await router.start()
    with pytest.raises(EngineError, match=r"config\.json is missing"):
        await asyncio.wait_for(router.wait_ready(), WAIT_S)

    assert (router.describe().failed, router.describe().reason) == (True, error)
    assert (router.describe().loaded_bytes, router.describe().total_bytes) == (5, 10)
    await router.stop()
    assert len(groups.made) == 1


async def test_a_group_that_cannot_be_made_fails_the_router() -> None:
    def make_group(_on_progress: OnProgress, _survivors: Survivors) -> FakeShardGroup:
        raise OSError("no more descriptors")

    router = Router(MODEL, CONFIG, make_group)
    await router.start()

    with pytest.raises(EngineError, match="OSError: no more descriptors"):
        await asyncio.wait_for(router.wait_ready(), WAIT_S)

    assert router.has_failed
    await router.stop()


async def test_a_group_that_cannot_be_cleared_away_fails_the_router(
    router: Router, groups: Groups, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stop() -> None:
        raise OSError("no such process")

    gateway = await connect()
    await gateway.begin(groups.made[0], 1, max_tokens=390)
    monkeypatch.setattr(groups.made[0], "stop", stop)

    groups.made[0].lose_rank()

    assert (await gateway.end_of(1)).reason == pb.End.REASON_UNAVAILABLE
    assert "OSError: no such process" in await asyncio.wait_for(router.wait_failed(), WAIT_S)
    assert router.has_failed
