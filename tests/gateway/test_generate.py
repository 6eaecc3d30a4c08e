"""Generate over real sockets: the events of a stream, cancellation, slow readers, a Router that goes away."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from cluster.gateway.served_model import ServedModel
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2
from mull.v1.generation_pb2_grpc import GenerationServiceStub
from tests.gateway.conftest import RunningGateway, ask, body, kinds, until
from tests.gateway.scripted_router import update

STOP = router_pb2.End.REASON_STOP
LENGTH = router_pb2.End.REASON_LENGTH
# What gRPC itself buffers for a client is bounded too; a small window makes that bound small.
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]


def completion(model: ServedModel, text: str) -> list[int]:
    return model.tokenizer.encode(text)


async def collect(call: grpc.aio.UnaryStreamCall) -> list[pb.GenerateEvent]:
    return [event async for event in call]


async def status_of(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    return caught.value.code(), str(caught.value.details())


async def test_thoughts_and_then_the_answer_stream_out(gateway: RunningGateway, model: ServedModel) -> None:
    # given
    ids = completion(model, "Easy: 4.\n</think>\n\n4<|im_end|>")
    gateway.router.on_submit = lambda submit: [
        gateway.router.send(update(submit.key, [token_id], admitted=7 if index == 0 else None,
                                   end=STOP if index == len(ids) - 1 else None))
        for index, token_id in enumerate(ids)
    ]  # fmt: skip
    # when
    events = await collect(gateway.stub.Generate(ask(request_id="mine", sampling=pb.SamplingOptions(seed=5))))
    # then
    assert kinds(events)[0] == "started"
    assert kinds(events)[-1] == "finished"
    assert [event.sequence for event in events] == list(range(len(events)))
    assert "".join(e.thinking_delta.text for e in events) == "Easy: 4."
    assert "".join(e.answer_delta.text for e in events) == "4"
    started, finished = events[0].started, events[-1].finished
    assert (started.request_id, started.model, started.seed, started.cached_tokens) == ("mine", "pocket", 5, 7)
    assert (finished.reason, finished.phase) == (pb.Finished.REASON_STOP, pb.PHASE_ANSWER)
    sent = [i for e in events for i in getattr(body(e), "token_ids", [])]
    assert sent == ids
    assert finished.usage.thinking_tokens + finished.usage.answer_tokens == len(ids)


async def test_the_router_gets_the_encoded_prompt_and_complete_sampling(
    gateway: RunningGateway, model: ServedModel
) -> None:
    gateway.router.on_submit = lambda submit: gateway.router.send(update(submit.key, [5], admitted=0, end=LENGTH))
    await collect(gateway.stub.Generate(ask("hi", sampling=pb.SamplingOptions(top_k=3, logprobs=2))))
    submit = await gateway.router.submitted()
    expected = model.tokenizer.encode(model.tokenizer.render_chat([{"role": "user", "content": "hi"}]))
    assert list(submit.prompt_ids) == expected
    assert submit.starts_thinking
    assert list(submit.stop_token_ids) == sorted(model.defaults.stop_token_ids)
    assert submit.max_tokens == model.max_model_len - len(expected)
    assert submit.sampling.top_k == 3
    assert submit.sampling.num_logprobs == 2
    assert submit.sampling.temperature == pytest.approx(0.6)
    assert submit.sampling.top_p == pytest.approx(0.95)
    assert submit.sampling.seed < 2**63


async def test_a_client_that_vanishes_is_cancelled_at_the_router(gateway: RunningGateway) -> None:
    # given: a stream under way
    call = gateway.stub.Generate(ask())
    submit = await gateway.router.submitted()
    gateway.router.send(update(submit.key, [40], admitted=0))
    await call.read()
    # when
    call.cancel()
    # then
    await gateway.router.cancelled(submit.key)
    await until(lambda: gateway.server.num_streams == 0, "the stream's slot to be free")


async def test_a_client_that_vanishes_while_it_waits_for_a_slot_is_cancelled(gateway: RunningGateway) -> None:
    call = gateway.stub.Generate(ask())
    submit = await gateway.router.submitted()
    call.cancel()
    await gateway.router.cancelled(submit.key)


async def test_a_finished_request_is_not_cancelled(gateway: RunningGateway) -> None:
    gateway.router.on_submit = lambda submit: gateway.router.send(update(submit.key, [5], admitted=0, end=LENGTH))
    for _ in range(3):
        await collect(gateway.stub.Generate(ask()))
    assert gateway.router.cancelled_keys == []


async def test_a_reader_that_never_reads_is_bounded_and_then_cancelled(gateway: RunningGateway) -> None:
    # given: a client that opens a stream and reads nothing
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.ports.grpc}", SMALL_WINDOW) as channel:
        await assert_bounded(gateway, GenerationServiceStub(channel).Generate(ask()))


async def assert_bounded(gateway: RunningGateway, call: grpc.aio.UnaryStreamCall) -> None:
    submit = await gateway.router.submitted()
    mailbox = gateway.server.copies.mailbox(submit.key)
    assert mailbox is not None
    # when: 100,000 tokens come
    gateway.router.send(update(submit.key, admitted=0))
    for _ in range(1000):
        gateway.router.send(update(submit.key, [40] * 100))
    # then: the Router is told, nothing past the bound was kept, and the client hears why
    await gateway.router.cancelled(submit.key)
    await until(lambda: gateway.server.num_streams == 0, "the stream's end")
    assert mailbox.num_unread_tokens_peak <= 2000 + 100
    assert mailbox.num_unread_tokens == 0
    code, details = await status_of(call)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "2000" in details
    assert "faster" in details


async def test_under_backlog_several_tokens_share_a_message(gateway: RunningGateway) -> None:
    updates = [update(1, [40 + i], admitted=0 if i == 0 else None) for i in range(50)]
    updates.append(update(1, [60], end=LENGTH))
    gateway.router.on_submit = lambda _submit: gateway.router.send(*updates)
    events = await collect(gateway.stub.Generate(ask()))
    assert kinds(events) == ["started", "thinking_delta", "thinking_ended", "finished"]
    assert len(events[1].thinking_delta.token_ids) == 51


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (router_pb2.End.REASON_OVERLOADED, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (router_pb2.End.REASON_INVALID, grpc.StatusCode.INVALID_ARGUMENT),
        (router_pb2.End.REASON_ERROR, grpc.StatusCode.INTERNAL),
    ],
)
async def test_the_routers_refusal_becomes_a_status(
    gateway: RunningGateway, reason: router_pb2.End.Reason, code: grpc.StatusCode
) -> None:
    gateway.router.on_submit = lambda submit: gateway.router.send(update(submit.key, end=reason, message="told why"))
    got, details = await status_of(gateway.stub.Generate(ask()))
    assert got is code
    assert "told why" in details


async def test_tokens_before_a_failure_are_delivered(gateway: RunningGateway) -> None:
    gateway.router.on_submit = lambda submit: gateway.router.send(
        update(submit.key, [40, 41], admitted=0, end=router_pb2.End.REASON_ERROR, message="a rank died")
    )
    call = gateway.stub.Generate(ask())
    events = [await call.read(), await call.read()]
    assert list(events[1].thinking_delta.token_ids) == [40, 41]
    assert await call.code() is grpc.StatusCode.INTERNAL


async def test_a_stream_whose_router_dies_goes_on_behind_its_tokens_once_it_is_back(gateway: RunningGateway) -> None:
    # given
    call = gateway.stub.Generate(ask(sampling=pb.SamplingOptions(seed=9)))
    first = await gateway.router.submitted()
    gateway.router.send(update(first.key, [40, 41], admitted=3))
    stream = aiter(call)
    events = [await anext(stream), await anext(stream)]
    gateway.router.send(update(first.key, [42]))
    events.append(await anext(stream))
    # when: the Router goes away and comes back at the same address
    port = int(gateway.router.address.rsplit(":")[-1])
    await gateway.router.stop()
    await until(lambda: not gateway.server.copies.is_connected, "the Router to be lost")
    refused, _ = await status_of(gateway.stub.Generate(ask()))
    await gateway.router.start(port)
    # then: it gets the same request with the output so far, and the client sees one stream
    second = await gateway.router.submitted(2)
    assert list(second.output_ids) == [40, 41, 42]
    gateway.router.send(update(second.key, [43], admitted=8, end=LENGTH))
    events += [event async for event in stream]
    assert refused is grpc.StatusCode.UNAVAILABLE
    assert [event.sequence for event in events] == list(range(len(events)))
    assert [i for e in events for i in getattr(body(e), "token_ids", [])] == [40, 41, 42, 43]
    assert kinds(events).count("started") == 1
    assert events[-1].finished.usage.cached_tokens == 3
    second.ClearField("output_ids")
    second.key = first.key
    assert second == first


async def test_a_router_that_gives_a_request_back_is_asked_again(gateway: RunningGateway) -> None:
    unavailable = router_pb2.End.REASON_UNAVAILABLE

    def answer(submit: router_pb2.Submit) -> None:
        if len(gateway.router.submits) < 3:
            gateway.router.send(update(submit.key, [40], admitted=0, end=unavailable, message="it must go"))
        else:
            gateway.router.send(update(submit.key, [41], admitted=0, end=LENGTH))

    gateway.router.on_submit = answer
    events = await collect(gateway.stub.Generate(ask()))
    assert [i for e in events for i in getattr(body(e), "token_ids", [])] == [40, 40, 41]
    assert [list(submit.output_ids) for submit in gateway.router.submits] == [[], [40], [40, 40]]


async def test_a_request_that_no_copy_can_go_on_with_fails_in_the_end(gateway: RunningGateway) -> None:
    stopping: list[asyncio.Task[None]] = []

    def answer(submit: router_pb2.Submit) -> None:
        gateway.router.send(update(submit.key, [40], admitted=0))
        stopping.append(asyncio.create_task(gateway.router.stop()))

    # At once: the deadline does not wait for this test.
    gateway.router.on_submit = answer
    code, _ = await status_of(gateway.stub.Generate(ask(timeout_seconds=0.2)))
    await asyncio.gather(*stopping)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert gateway.server.num_streams == 0


async def test_a_session_that_the_router_closes_is_opened_again(gateway: RunningGateway) -> None:
    await until(lambda: gateway.router.num_sessions == 1, "the first session")
    gateway.router.end_session()
    await until(lambda: gateway.router.num_sessions == 2, "the next session")
    gateway.router.on_submit = lambda submit: gateway.router.send(update(submit.key, [5], admitted=0, end=LENGTH))
    await until(lambda: gateway.server.copies.is_connected, "a new session")
    assert kinds(await collect(gateway.stub.Generate(ask())))[-1] == "finished"


async def test_streams_past_the_limit_are_refused(gateway: RunningGateway) -> None:
    calls = [gateway.stub.Generate(ask()) for _ in range(8)]
    await gateway.router.submitted(8)
    code, details = await status_of(gateway.stub.Generate(ask()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "8" in details
    for call in calls:
        call.cancel()


async def test_logprobs_are_one_per_token(gateway: RunningGateway, model: ServedModel) -> None:
    ids = completion(model, "a</think>b<|im_end|>")
    entries = [router_pb2.RouterLogprobs(logprob=-i, top_ids=[i, 66], top_logprobs=[-i, -9]) for i in range(len(ids))]
    message = router_pb2.SequenceUpdate(key=1, token_ids=ids, logprobs=entries, end=router_pb2.End(reason=STOP))
    gateway.router.on_submit = lambda _submit: gateway.router.send(message)
    events = await collect(gateway.stub.Generate(ask(sampling=pb.SamplingOptions(logprobs=2))))
    logprobs = [entry for e in events for entry in getattr(body(e), "logprobs", [])]
    assert [entry.logprob for entry in logprobs] == [-i for i in range(len(ids))]
    assert logprobs[0].top[1].text == model.tokenizer.token_bytes[66].decode()


async def test_many_streams_do_not_mix(gateway: RunningGateway, model: ServedModel) -> None:
    texts = [f"stream number {n}" for n in range(8)]

    def answer(submit: router_pb2.Submit) -> None:
        ids = completion(model, "</think>" + texts[int(submit.request_id)])
        for index, token_id in enumerate(ids):
            end = LENGTH if index == len(ids) - 1 else None
            gateway.router.send(update(submit.key, [token_id], admitted=0 if index == 0 else None, end=end))

    gateway.router.on_submit = answer
    streams = [collect(gateway.stub.Generate(ask(request_id=str(n)))) for n in range(8)]
    for text, events in zip(texts, await asyncio.gather(*streams), strict=True):
        assert "".join(e.answer_delta.text for e in events) == text
