"""Errors in OpenAI's shape with the right status, before a stream and in it; limits, readiness, small routes."""

from __future__ import annotations

import pytest

from cluster.errors import EngineError, InvalidRequest, NotReady, Overloaded, PromptTooLong, UnknownModel
from tests.gateway_http.conftest import Site, question, sse, started, thought


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InvalidRequest("sampling.top_p: 3 is too much", field="sampling.top_p"), 400, "invalid_request_error", None),
        (PromptTooLong("input: long", field="input"), 400, "invalid_request_error", "context_length_exceeded"),
        (UnknownModel("model: no", field="model"), 404, "invalid_request_error", "model_not_found"),
        (Overloaded("full"), 429, "rate_limit_error", "overloaded"),
        (NotReady("loading"), 503, "server_error", "not_ready"),
        (EngineError("broken"), 500, "server_error", "internal_error"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_event_has_its_own_status(
    site: Site, error: Exception, status: int, kind: str, code: str | None, stream: bool
) -> None:
    site.core.batches = [error]
    reply = await site.chat(stream=stream)

    said = reply.json()["error"]
    assert (reply.status_code, said["type"], said["code"]) == (status, kind, code)
    assert set(said) == {"message", "type", "param", "code"}


async def test_a_field_is_named_as_the_client_wrote_it(site: Site) -> None:
    site.core.batches = [InvalidRequest("sampling.top_p: 3 is too much", field="sampling.top_p")]
    said = (await site.chat()).json()["error"]

    assert (said["param"], said["message"]) == ("top_p", "top_p: 3 is too much")


async def test_a_client_that_came_too_early_is_told_when_to_come_again(site: Site) -> None:
    site.core.batches = [Overloaded("full")]

    assert (await site.chat()).headers["retry-after"] == "1"


async def test_an_unexpected_fault_tells_the_request_id_and_nothing_else(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.core.batches = [RuntimeError("a secret")]
    reply = await site.chat()

    assert reply.status_code == 500
    assert "a secret" not in reply.text
    assert reply.headers["x-request-id"] in reply.json()["error"]["message"]
    assert "RuntimeError" in caplog.text
    assert "a secret" not in caplog.text


async def test_an_error_in_a_stream_is_its_last_event(site: Site) -> None:
    site.core.batches = [[started(), thought("hm")], NotReady("the engine was lost")]
    reply = await site.chat(stream=True)

    assert reply.status_code == 200
    assert sse(reply)[-1]["error"]["message"] == "the engine was lost"


async def test_a_wrong_type_is_400_and_names_the_field(site: Site) -> None:
    reply = await site.chat(temperature="hot")

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "temperature"
    assert reply.json()["error"]["message"] == "temperature: is a string; send a number"


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b"", b"[" * 50_000, b'{"user": "\\ud800"}'])
async def test_a_body_that_is_no_object_is_400(site: Site, body: bytes) -> None:
    reply = await site.client.post("/v1/chat/completions", content=body)

    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "body"


async def test_a_body_over_the_bound_is_413_whether_it_says_its_length_or_not(site: Site) -> None:
    async def pieces():
        for _ in range(100):
            yield b" " * 1000

    declared = await site.chat(text="x" * 70_000)
    undeclared = await site.client.post("/v1/chat/completions", content=pieces())

    for reply in (declared, undeclared):
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


async def test_unknown_paths_and_methods_have_openais_shape(site: Site) -> None:
    missing, wrong = await site.client.get("/v2/nothing"), await site.client.get("/v1/chat/completions")

    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert missing.json()["error"]["type"] == wrong.json()["error"]["type"] == "invalid_request_error"


async def test_a_server_that_is_not_ready_says_why(site: Site) -> None:
    site.not_ready.append("the ranks are loading")
    ready, chat, health = await site.client.get("/ready"), await site.chat(), await site.client.get("/health")

    assert (ready.status_code, ready.json()["reason"]) == (503, "the ranks are loading")
    assert chat.status_code == 503
    assert "the ranks are loading" in chat.json()["error"]["message"]
    assert health.status_code == 200


async def test_small_routes(site: Site) -> None:
    models = (await site.client.get("/v1/models")).json()

    assert [model["id"] for model in models["data"]] == ["pocket"]
    assert (await site.client.get("/v1/models/pocket")).json() == models["data"][0]
    assert (await site.client.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"
    assert (await site.client.get("/ready")).json() == {"ready": True, "reason": None}
    assert (await site.client.get("/version")).json()["version"]


async def test_text_goes_to_token_ids_and_back(site: Site) -> None:
    tokens = (await site.post("/tokenize", {"prompt": "What is 2+2?", "return_token_strs": True})).json()
    back = (await site.post("/detokenize", {"tokens": tokens["tokens"]})).json()

    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert back == {"prompt": "What is 2+2?"}
    assert (await site.post("/tokenize", question())).json()["count"] > 0
    assert (await site.post("/tokenize", {})).json()["error"]["param"] == "prompt"


async def test_template_variables_reach_the_tokenizer(site: Site) -> None:
    await site.post("/tokenize", question(chat_template_kwargs={"mood": "calm"}))

    assert site.core.tokenized[-1].chat_template_variables_json == '{"mood":"calm"}'
