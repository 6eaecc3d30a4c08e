"""A text completion of several prompts: each is a request for the Router, and the client sees one answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest

from mull.v1 import router_pb2
from tests.gateway.conftest import RunningGateway, until
from tests.gateway.scripted_router import WAIT_S, update

LENGTH = router_pb2.End.REASON_LENGTH
BODY = {"prompt": [[5, 6], [7]], "n": 2, "max_tokens": 1}


@pytest.fixture
async def client(gateway: RunningGateway) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.ports.http}", timeout=WAIT_S) as client:
        yield client


def answer_with_the_prompt(gateway: RunningGateway, submit: router_pb2.Submit) -> None:
    """The one token of each generation says which prompt it was of."""
    gateway.router.send(update(submit.key, [submit.prompt_ids[0] + 40], admitted=1, end=LENGTH))


async def test_choices_are_numbered_prompt_by_prompt(gateway: RunningGateway, client: httpx.AsyncClient) -> None:
    gateway.router.on_submit = lambda submit: answer_with_the_prompt(gateway, submit)
    token_text = gateway.server.core.model.tokenizer.token_text

    done = (await client.post("/v1/completions", json=BODY)).json()

    texts = [(choice["index"], choice["text"]) for choice in done["choices"]]
    assert texts == [(0, token_text(45)), (1, token_text(45)), (2, token_text(47)), (3, token_text(47))]
    usage = done["usage"]
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (2 + 1, 1 + 1)
    assert usage["completion_tokens"] == 4


async def test_a_stream_tells_all_choices_and_one_usage(gateway: RunningGateway, client: httpx.AsyncClient) -> None:
    gateway.router.on_submit = lambda submit: answer_with_the_prompt(gateway, submit)

    reply = await client.post(
        "/v1/completions", json={**BODY, "stream": True, "stream_options": {"include_usage": True}}
    )

    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    finished = {c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"] == "length"}
    assert finished == {0, 1, 2, 3}
    assert [chunk["usage"]["prompt_tokens"] for chunk in chunks if chunk["usage"]] == [3]
    assert reply.text.endswith("data: [DONE]\n\n")


async def test_one_prompt_that_cannot_run_refuses_all_and_cancels_the_others(
    gateway: RunningGateway, client: httpx.AsyncClient
) -> None:
    reply = await client.post("/v1/completions", json={"prompt": [[5], [999_999]]})

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "token_ids.ids[0]")
    await until(lambda: gateway.server.num_streams == 0, "the other prompt's slot")


async def test_a_client_that_goes_cancels_every_prompt(gateway: RunningGateway, client: httpx.AsyncClient) -> None:
    gateway.router.on_submit = lambda submit: gateway.router.send(update(submit.key, [40], admitted=0))
    async with client.stream("POST", "/v1/completions", json={"prompt": [[5], [6], [7]], "stream": True}):
        await gateway.router.submitted(3)

    for submit in gateway.router.submits:
        await gateway.router.cancelled(submit.key)
    await until(lambda: gateway.server.num_streams == 0, "the slots")


async def test_the_prompts_of_one_request_share_its_id(gateway: RunningGateway, client: httpx.AsyncClient) -> None:
    gateway.router.on_submit = lambda submit: answer_with_the_prompt(gateway, submit)

    await client.post("/v1/completions", json={"prompt": ["a", "b"]}, headers={"x-request-id": "mine"})

    assert [submit.request_id for submit in gateway.router.submits] == ["mine", "mine"]
