"""The mailbox of one gateway: merging, the bound on messages, the bound on what is unread."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import SlowReader
from cluster.router.sequence import FinishReason, SequenceUpdate
from cluster.router.session import Session
from mull.v1 import router_pb2 as pb
from workers.step import TokenLogprobs


def update(*token_ids: int, finish: FinishReason | None = None, num_logprobs: int = 0) -> SequenceUpdate:
    logprobs = [TokenLogprobs(-1.0, [(1, -1.0)] * num_logprobs) for _ in token_ids] if num_logprobs else []
    return SequenceUpdate(key=None, token_ids=list(token_ids), logprobs=logprobs, finish=finish)


async def test_updates_that_are_not_read_are_merged_per_request() -> None:
    session = Session(0)
    session.live |= {1, 2}

    session.push(1, SequenceUpdate(key=None, admitted_cached_tokens=4))
    session.push(1, update(5))
    session.push(2, update(8))
    session.push(1, update(6, finish=FinishReason.STOP))
    first, second = (await session.next()).updates

    assert (first.key, list(first.token_ids), first.admitted.cached_tokens) == (1, [5, 6], 4)
    assert first.end.reason == pb.End.REASON_STOP
    assert (second.key, list(second.token_ids), second.HasField("end")) == (2, [8], False)
    assert (session.live, session.num_unread) == ({2}, 0)


async def test_a_key_that_is_used_again_does_not_join_its_ended_request() -> None:
    session = Session(0)

    session.push(1, update(5, finish=FinishReason.STOP))
    session.push(1, update(6))
    ended, begun = (await session.next()).updates

    assert (list(ended.token_ids), list(begun.token_ids)) == ([5], [6])


async def test_forced_tokens_are_the_last_ones_of_their_message() -> None:
    session = Session(0)

    session.push(1, update(5))
    session.push(1, SequenceUpdate(key=None, token_ids=[8, 9], num_forced=2))
    session.push(1, update(6))
    first, second = (await session.next()).updates

    assert (list(first.token_ids), first.num_forced) == ([5, 8, 9], 2)
    assert (list(second.token_ids), second.num_forced) == ([6], 0)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 2), st.booleans()), max_size=40))
def test_nothing_is_lost_or_reordered_and_messages_stay_bounded(
    pushes: list[tuple[int, int, int, bool]],
) -> None:
    async def scenario() -> None:
        session = Session(0, max_message=10)
        sent: dict[int, list[int]] = {1: [], 2: [], 3: []}
        got: dict[int, list[int]] = {1: [], 2: [], 3: []}

        async def read() -> None:
            for item in (await session.next()).updates:
                got[item.key] += item.token_ids

        for number, (key, count, num_logprobs, reads) in enumerate(pushes):
            sent[key] += [number] * count
            session.push(key, update(*[number] * count, num_logprobs=num_logprobs))
            if reads:
                await read()
        while session.num_unread:
            before = session.num_unread
            await read()
            assert before - session.num_unread < 10 + 1 + 6 * 4  # closed by the update that reaches the bound
        assert got == sent

    asyncio.run(scenario())


async def test_a_gateway_that_does_not_read_breaks_its_session_at_the_bound() -> None:
    session = Session(0, max_unread=100)

    for step in range(200):
        session.push(step % 3, update(step, num_logprobs=2))
        assert session.num_unread <= 100

    with pytest.raises(SlowReader, match="100 items"):
        raise await asyncio.wait_for(session.wait_broken(), 60)
