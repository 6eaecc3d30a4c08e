"""The line that each request leaves in the log: what it tells, and that no text is in it."""

from __future__ import annotations

import json
import logging
from typing import Any

import grpc
import pytest

from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2
from tests.gateway.conftest import RunningGateway, ask, until
from tests.gateway.scripted_router import update
from workers.logs import JsonLines, TextLines

SECRET = "the launch code"


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """As an operator sees them."""
    form = TextLines("gateway")
    return [form.format(record) for record in caplog.records if record.name == "cluster.gateway.request_log"]


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    form = JsonLines("gateway")
    return [json.loads(form.format(it)) for it in caplog.records if it.name == "cluster.gateway.request_log"]


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

    (line,) = told(caplog)
    times = [line.pop(name) for name in ("time_to_first_token_s", "time_to_first_answer_s", "total_s")]
    assert 0 < times[0] <= times[1] <= times[2]
    assert {name: line[name] for name in list(line)[list(line).index("message") :]} == {
        "message": "request ended",
        "request_id": "mine",
        "status": "OK",
        "finish": "length",
        "prompt_tokens": 4,
        "cached_tokens": 3,
        "thinking_tokens": 0,
        "answer_tokens": 3,
        "metadata": {"job": "7\nrequest", "a": "b"},
    }


async def test_a_request_that_was_cut_in_its_thoughts_has_no_time_to_an_answer(
    gateway: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gateway.router.on_submit = lambda submit: gateway.router.send(
        update(submit.key, [40, 41], admitted=0, end=router_pb2.End.REASON_LENGTH)
    )

    await gateway.stub.Complete(ask())

    (line,) = told(caplog)
    assert line["thinking_tokens"] == 2
    assert "time_to_first_token_s" in line
    assert "time_to_first_answer_s" not in line


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

    wrong, left = told(caplog)
    assert (wrong["request_id"], wrong["status"], wrong["prompt_tokens"]) == ("wrong", "INVALID_ARGUMENT", 0)
    assert "finish" not in wrong
    assert (left["request_id"], left["status"], left["finish"]) == ("left", "CANCELLED", "none")


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
    assert SECRET not in caplog.text + "".join(lines(caplog))
