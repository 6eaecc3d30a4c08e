"""What a gateway writes to its log over whole exchanges, faults included: request ids, never keys or texts."""

from __future__ import annotations

import logging

import grpc.aio
import pytest

from cluster.gateway.http.routes import Routes
from mull.v1 import generation_pb2 as pb
from tests.gateway.conftest import ask
from tests.gateway.test_access import Guarded, bearer, guarded  # noqa: F401  # a fixture
from workers.logs import TextLines

PROMPT = "the marker of a prompt"
ANSWER = "the marker of an answer"


def written(caplog: pytest.LogCaptureFixture) -> str:
    """Fields included."""
    return "\n".join(map(TextLines("gateway").format, caplog.records))


async def test_neither_keys_nor_texts_are_logged(
    guarded: Guarded,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    model = guarded.server.core.model
    guarded.answer(*model.tokenizer.encode(ANSWER), 151645 if model.vocab_size > 151645 else 2)
    key, headers = bearer(guarded.acme), dict(bearer(guarded.acme))
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 100}

    # given: exchanges that go well, that are refused, and that fail for a fault of ours
    await guarded.stub.Complete(ask(PROMPT, max_tokens=100), metadata=key, timeout=60)
    for stream in (False, True):
        answer = await guarded.http.post("/v1/chat/completions", json=chat | {"stream": stream}, headers=headers)
        assert ANSWER in answer.text or stream
    await guarded.http.post("/v1/chat/completions", json=chat | {"top_p": 7}, headers=headers)
    await guarded.http.post(
        "/v1/chat/completions", json=chat, headers={"authorization": "Bearer wrong-" + guarded.acme}
    )
    await guarded.stub.Tokenize(pb.TokenizeRequest(text=PROMPT), metadata=key)

    def fail(*_: object) -> None:
        raise KeyError(PROMPT, guarded.acme)

    monkeypatch.setattr(guarded.server.copies, "submit", fail)
    monkeypatch.setattr(Routes, "_body", fail)
    with pytest.raises(grpc.aio.AioRpcError):
        await guarded.stub.Complete(ask(PROMPT, request_id="grpc-17"), metadata=key, timeout=60)
    failed = await guarded.http.post("/tokenize", json=chat, headers=headers | {"x-request-id": "http-17"})

    # then
    log = written(caplog)
    assert failed.status_code == 500
    assert "request ended" in log
    assert "tenant=acme status=OK" in log
    assert "grpc-17 failed: KeyError" in log
    assert "http-17 failed: KeyError" in log
    for secret in (PROMPT, ANSWER, guarded.acme, guarded.acme.split("-", 2)[2]):
        assert secret not in log
        assert secret not in failed.text
