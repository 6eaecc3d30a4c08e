"""The line that each request leaves in the log: what it tells, and that no text is in it."""

from __future__ import annotations

import logging

import grpc
import pytest

from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2
from tests.gateway.conftest import RunningGateway, ask, until
from tests.gateway.scripted_router import update

SECRET = "the launch code"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "cluster.gateway.request_log"]


async def test_a_request_leaves_one_line_with_its_notes_and_counts(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gateway.router.on_submit = lambda submit: gateway.router.send(
        update(submit.key, [40, 41, 42], admitted=3, end=router_pb2.End.REASON_LENGTH)
    )
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5, 6, 7, 8]), request_id="mine", metadata={"job": "7\nrequest", "a": "b"}
    )

    await gateway.stub.Complete(request)

    (line,) = lines(caplog)
    assert line == (
        "request mine ended: status OK, finish length, prompt tokens 4, cached 3, thinking 0, answer 3, "
        'metadata {"a": "b", "job": "7\\nrequest"}'
    )


async def test_a_request_that_fails_or_is_cancelled_leaves_its_line_too(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(grpc.aio.AioRpcError):
        await gateway.stub.Complete(ask(request_id="wrong", max_tokens=0))
    call = gateway.stub.Generate(ask(request_id="left"))
    await gateway.router.submitted()
    call.cancel()
    await until(lambda: len(lines(caplog)) == 2, "the second line")

    wrong, left = lines(caplog)
    assert wrong.startswith("request wrong ended: status INVALID_ARGUMENT, finish none, prompt tokens 0")
    assert left.startswith("request left ended: status CANCELLED, finish none")


async def test_a_request_that_is_refused_cannot_fill_the_log(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for request in (ask(request_id="x\nfaked line" * 1000), ask(metadata={"a": "x" * 10_000})):
        with pytest.raises(grpc.aio.AioRpcError):
            await gateway.stub.Complete(request)

    assert len(lines(caplog)) == 2
    assert all(len(line) < 300 and "\n" not in line for line in lines(caplog))


async def test_no_line_of_a_whole_exchange_has_text_in_it(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="cluster")
    ids = gateway.server.core.model.tokenizer.encode(SECRET)
    gateway.router.on_submit = lambda submit: gateway.router.send(
        update(submit.key, ids, admitted=0, end=router_pb2.End.REASON_LENGTH)
    )

    reply = await gateway.stub.Complete(ask(SECRET))

    assert SECRET in reply.completions[0].thinking + reply.completions[0].answer
    assert lines(caplog)
    assert SECRET not in caplog.text
