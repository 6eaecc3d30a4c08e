"""The Router as a gateway meets it: a real gRPC server and channel, ranks that check every plan."""

from __future__ import annotations

import asyncio
import itertools

import grpc
import pytest

from cluster.errors import EngineError
from cluster.router.router import Router
from cluster.router.wire import to_request
from mull.v1 import router_pb2 as pb
from tests.router.router_site import (
    CONFIG,
    MAX_UNREAD,
    MODEL,
    NUM_BLOCKS,
    REGEX,
    THINK_END,
    WAIT_S,
    Connect,
    Groups,
    alone,
    submit,
    until,
)
from workers.step import Grammar


async def test_a_request_gets_its_tokens_and_its_end(connect: Connect) -> None:
    gateway = await connect()

    message = await gateway.submit(7)
    end = await gateway.end_of(7)

    assert end.reason == pb.End.REASON_LENGTH
    assert gateway.tokens(7) == alone(message)
    assert gateway.updates[7][0].admitted.cached_tokens == 0


async def test_requests_of_two_gateways_each_get_the_tokens_that_they_get_alone(connect: Connect) -> None:
    gateways = [await connect(), await connect()]
    messages = [
        [await gateway.submit(key, prompt_ids=[key, index, *range(key)], max_tokens=30) for key in range(1, 25)]
        for index, gateway in enumerate(gateways)
    ]

    for gateway, submitted in zip(gateways, messages, strict=True):
        for message in submitted:
            await gateway.end_of(message.key)

            assert gateway.tokens(message.key) == alone(message)


async def test_a_step_sends_one_message_with_the_tokens_of_all_requests(router: Router, connect: Connect) -> None:
    gateway = await connect()

    for key in range(1, 9):
        await gateway.submit(key, max_tokens=100)
    for key in range(1, 9):
        await gateway.end_of(key)

    assert gateway.num_messages <= router.stats().num_steps_total < 8 * 100


async def test_a_stop_token_ends_the_request_and_is_its_last_token(connect: Connect) -> None:
    gateway = await connect()
    expected = alone(submit(1))

    await gateway.submit(1, stop_token_ids=[expected[4]])
    end = await gateway.end_of(1)

    assert end.reason == pb.End.REASON_STOP
    assert gateway.tokens(1) == expected[: expected.index(expected[4]) + 1]


async def test_rules_of_a_request_reach_the_ranks(connect: Connect) -> None:
    gateway = await connect()

    words = [pb.TokenSequence(ids=[token]) for token in range(10)]
    message = await gateway.submit(1, bad_words=words, stop_token_ids=range(10, 40), min_tokens=5)
    end = await gateway.end_of(1)

    assert end.reason == pb.End.REASON_STOP
    assert gateway.tokens(1) == alone(message)
    assert [token // 10 for token in gateway.tokens(1)[:5]] == [4] * 5


async def test_a_thinking_budget_closes_the_thoughts(connect: Connect) -> None:
    gateway = await connect()
    close = [8, THINK_END, 9]

    fields: dict[str, object] = {"starts_thinking": True, "bad_words": [pb.TokenSequence(ids=[THINK_END])]}
    message = await gateway.submit(1, thinking_budget=6, close_thinking_ids=close, **fields)
    await gateway.submit(2, thinking_budget=0, **fields)
    await gateway.end_of(1)
    await gateway.end_of(2)

    assert gateway.tokens(1) == alone(message)
    [forced] = [update for update in gateway.updates[1] if update.num_forced]
    assert list(forced.token_ids)[-3:] == close == gateway.tokens(1)[6:9]
    assert gateway.tokens(2)[0] == THINK_END, "without a phrase, the tag alone is forced"


async def test_a_gateway_lowers_the_budget_of_a_running_request(groups: Groups, connect: Connect) -> None:
    gateway = await connect()
    fields: dict[str, object] = {"starts_thinking": True, "bad_words": [pb.TokenSequence(ids=[THINK_END])]}
    await gateway.begin(groups.made[0], 1, max_tokens=390, **fields)

    await gateway.call.write(pb.GatewayMessage(set_budget=pb.SetBudget(key=1, thinking_budget=1)))
    await gateway.call.write(pb.GatewayMessage(set_budget=pb.SetBudget(key=77, thinking_budget=1)))
    await gateway.submit(2, prompt_ids=[])
    await gateway.end_of(2)  # messages are taken in order
    groups.made[0].release()
    await gateway.end_of(1)

    assert gateway.tokens(1).index(THINK_END) < 389
    assert sum(update.num_forced for update in gateway.updates[1]) == 1


async def test_logprobs_of_the_prompt_come_with_the_first_token(connect: Connect) -> None:
    gateway = await connect()

    await gateway.submit(1, prompt_ids=list(range(1, 40)) * 4, num_prompt_logprobs=1)
    await gateway.end_of(1)

    first = gateway.updates[1][0]
    assert [item.logprob for item in first.prompt_logprobs] == [-float(token) for token in (list(range(1, 40)) * 4)[1:]]
    assert first.HasField("admitted")
    assert first.token_ids
    assert all(not update.prompt_logprobs for update in gateway.updates[1][1:])


def test_a_grammar_waits_for_the_end_of_thoughts_that_there_are() -> None:
    after = pb.Grammar(kind=pb.Grammar.KIND_EBNF, text="x", after_thinking=True)

    thinks = to_request(submit(1, grammar=after, starts_thinking=True), 0, MODEL)
    answers = to_request(submit(1, grammar=after), 0, MODEL)
    at_once = to_request(submit(1, grammar=REGEX, starts_thinking=True), 0, MODEL)

    assert thinks.grammar == Grammar("ebnf", "x", THINK_END)
    assert answers.grammar == Grammar("ebnf", "x", None)
    assert (at_once.grammar, at_once.starts_thinking) == (Grammar("regex", "[0-9]", None), False)


async def test_logprobs_reach_the_gateway_that_asked(connect: Connect) -> None:
    gateway = await connect()

    await gateway.submit(1, sampling=pb.RouterSampling(top_p=1, repetition_penalty=1, num_logprobs=2))
    await gateway.end_of(1)

    logprobs = [item for update in gateway.updates[1] for item in update.logprobs]
    assert [item.logprob for item in logprobs] == [-token_id for token_id in gateway.tokens(1)]
    assert all(len(item.top_ids) == len(item.top_logprobs) == 2 for item in logprobs)


async def test_a_cancelled_request_ends_and_frees_its_blocks(router: Router, groups: Groups, connect: Connect) -> None:
    gateway = await connect()
    await gateway.begin(groups.made[0], 1, max_tokens=390)

    await gateway.cancel(1)
    end = await gateway.end_of(1)

    assert end.reason == pb.End.REASON_CANCELLED
    assert router.describe().num_running == 0
    groups.made[0].release()
    await until(lambda: router.describe().num_free_blocks == NUM_BLOCKS, "every block to be free")


async def test_a_gateway_that_vanishes_frees_its_blocks(router: Router, groups: Groups, connect: Connect) -> None:
    gateway = await connect()
    await gateway.begin(groups.made[0], *range(1, 5), max_tokens=390)

    gateway.call.cancel()

    await until(lambda: router.stats().num_sessions == 0, "the session to be closed")
    assert router.describe().num_running == router.describe().num_waiting == 0
    groups.made[0].release()
    await until(lambda: router.describe().num_free_blocks == NUM_BLOCKS, "every block to be free")


async def test_a_full_router_refuses_with_a_clear_error(groups: Groups, connect: Connect) -> None:
    gateway = await connect()
    groups.made[0].hold()

    for key in range(60):
        await gateway.submit(key)
    end = await gateway.end_of(59)

    assert end.reason == pb.End.REASON_OVERLOADED
    assert "the limit is 48" in end.message
    groups.made[0].release()
    assert (await gateway.end_of(0)).reason == pb.End.REASON_LENGTH


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt_ids": []}, "empty"),
        ({"prompt_ids": [1, 50]}, "token id 50 is not in the vocabulary of 50"),
        ({"stop_token_ids": [2**32 - 1]}, "4294967295"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_ids": [1] * 400}, "400"),
        ({"sampling": pb.RouterSampling(top_p=1, repetition_penalty=1, seed=2**63)}, "seed"),
        ({"sampling": pb.RouterSampling(top_p=0, repetition_penalty=1)}, "top_p"),
        ({"sampling": pb.RouterSampling(top_p=1, repetition_penalty=1, temperature=float("nan"))}, "temperature"),
        ({"sampling": pb.RouterSampling(top_p=1, repetition_penalty=1, num_logprobs=21)}, "logprobs"),
        ({"sampling": pb.RouterSampling(top_p=1, repetition_penalty=1e-45)}, "repetition_penalty"),
        ({"sampling": pb.RouterSampling(top_p=1, repetition_penalty=1, logit_bias={50: 1})}, "token id 50"),
        ({"sampling": pb.RouterSampling(top_p=1, repetition_penalty=1, logit_bias={5: float("nan")})}, "logit_bias"),
        ({"bad_words": [pb.TokenSequence(ids=[1]), pb.TokenSequence()]}, "bad word has 0 tokens"),
        ({"bad_words": [pb.TokenSequence(ids=[1, 50])]}, "token id 50"),
        ({"thinking_budget": 3, "close_thinking_ids": [1, 50]}, "token id 50"),
        ({"thinking_budget": 3, "close_thinking_ids": [1]}, "close_thinking_ids"),
        ({"grammar": pb.Grammar(text="a")}, "kind of grammar 0"),
        ({"num_prompt_logprobs": 21}, "prompt_logprobs"),
        ({"num_prompt_logprobs": 20, "prompt_ids": [1] * 15_000}, "ask for fewer"),
        ({"grammar": REGEX, "starts_thinking": True, "thinking_budget": 3}, "no thoughts to limit"),
    ],
)
async def test_a_request_that_cannot_run_is_invalid(connect: Connect, fields: dict[str, object], words: str) -> None:
    gateway = await connect()

    await gateway.submit(1, **fields)
    end = await gateway.end_of(1)

    assert end.reason == pb.End.REASON_INVALID
    assert words in end.message


async def test_a_key_that_is_used_twice_breaks_the_session(connect: Connect, groups: Groups) -> None:
    gateway = await connect()
    groups.made[0].hold()

    await gateway.submit(1)
    await gateway.submit(1)

    assert await gateway.call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "key 1" in await gateway.call.details()


async def test_describe_tells_phases_and_totals(router: Router, groups: Groups, connect: Connect) -> None:
    gateway = await connect()
    await gateway.submit(1, prompt_ids=[1] * 9)
    await gateway.end_of(1)
    thinks: dict[str, object] = {"starts_thinking": True, "bad_words": [pb.TokenSequence(ids=[THINK_END])]}
    await gateway.begin(groups.made[0], 2, prompt_ids=[1] * 9, max_tokens=390, **thinks)
    await gateway.begin(groups.made[0], 3, max_tokens=390)

    described = router.describe()

    assert (described.num_thinking, described.num_answering) == (1, 1)
    assert described.num_steps_total == router.stats().num_steps_total > 0
    assert (described.prefix_query_tokens_total, described.prefix_hit_tokens_total) == (9 + 9 + 3, 8)
    assert (described.num_preempted_total, described.num_restarts_total) == (0, 0)


async def test_describe_tells_what_is_served(connect: Connect) -> None:
    gateway = await connect()

    described = await gateway.stub.Describe(pb.DescribeRequest())

    assert (described.model, described.ready, described.reason) == ("fake", True, "")
    assert (described.num_blocks, described.num_free_blocks, described.block_size) == (NUM_BLOCKS, NUM_BLOCKS, 4)
    assert (described.max_model_len, described.tensor_parallel_size) == (CONFIG.max_model_len, 2)
    assert [rank.pid for rank in described.ranks] == [1000, 1001]


async def test_a_port_that_is_taken_is_refused(router: Router) -> None:
    second = Router(MODEL, CONFIG, Groups())

    with pytest.raises(EngineError, match="cannot listen"):
        await second.start(port=int(router.address.rpartition(":")[2]))
    await second.stop()


async def test_stop_ends_open_sessions_and_stops_the_ranks(router: Router, groups: Groups, connect: Connect) -> None:
    gateway = await connect()
    await gateway.begin(groups.made[0], 1, max_tokens=390)

    await router.stop()

    assert groups.made[0].num_stops == 1
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await gateway.end_of(2)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_what_still_runs_at_the_end_is_given_back_with_all_of_its_output(
    router: Router, groups: Groups, connect: Connect
) -> None:
    gateway = await connect()
    [message] = await gateway.begin(groups.made[0], 1, max_tokens=390)

    assert router.describe().ready
    stopping = asyncio.create_task(router.stop(grace_s=0.02))
    await asyncio.sleep(0)
    described = router.describe()
    end = await gateway.end_of(1)
    await stopping

    assert not described.ready
    assert "stopping" in described.reason
    assert end.reason == pb.End.REASON_UNAVAILABLE
    assert gateway.tokens(1) == alone(message)[: len(gateway.tokens(1))]


async def test_stop_with_grace_lets_live_requests_end_and_refuses_new_ones(
    router: Router, groups: Groups, connect: Connect
) -> None:
    gateway = await connect()
    [message] = await gateway.begin(groups.made[0], 1, max_tokens=300)

    stopping = asyncio.create_task(router.stop(grace_s=WAIT_S))
    await asyncio.sleep(0)
    await gateway.submit(2)

    assert (await gateway.end_of(2)).reason == pb.End.REASON_UNAVAILABLE
    groups.made[0].release()
    assert (await gateway.end_of(1)).reason == pb.End.REASON_LENGTH
    assert gateway.tokens(1) == alone(message)
    await asyncio.wait_for(stopping, WAIT_S)


async def test_a_gateway_that_never_reads_is_bounded_and_then_cut_off(router: Router, connect: Connect) -> None:
    gateway = await connect()
    sampling = pb.RouterSampling(top_p=1, repetition_penalty=1, num_logprobs=20)
    keys = itertools.count()
    most_unread = 0

    async def keep_busy() -> None:
        while True:
            await gateway.submit(next(keys), max_tokens=390, sampling=sampling)

    busy = asyncio.create_task(keep_busy())
    async with asyncio.timeout(60):
        while most_unread == 0 or router.stats().num_sessions > 0:
            most_unread = max(most_unread, router.stats().num_unread)
            await asyncio.sleep(0)

    busy.cancel()
    await asyncio.gather(busy, return_exceptions=True)
    assert 0 < most_unread <= MAX_UNREAD
    assert router.describe().num_running == router.describe().num_waiting == 0
