"""A real HTTP server on a free port, over a core whose events a test writes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from cluster.config import GatewayConfig, ModelSource
from cluster.gateway.access import Access, Caller
from cluster.gateway.http.server import HttpServer
from cluster.gateway.served_model import ServedModel
from mull.v1 import generation_pb2 as pb
from tests.gateway.conftest import POCKET

WAIT_S = 60.0


@pytest.fixture(scope="session")
def model() -> ServedModel:
    return ServedModel.load(ModelSource(path=POCKET, name="pocket"))


@dataclass
class WrittenCore:
    """GenerationCore's interface; `batches` is what every stream yields, an exception in it is raised."""

    model: ServedModel
    batches: Sequence[list[pb.GenerateEvent] | Exception | asyncio.Event] = ()
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    tokenized: list[pb.TokenizeRequest] = field(default_factory=list)
    num_yielded: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def stream(
        self, request: pb.GenerateRequest, _caller: Caller, *, trace_parent: str | None
    ) -> AsyncGenerator[list[pb.GenerateEvent], None]:
        del trace_parent
        self.requests.append(request)
        try:
            for batch in self.batches:
                if isinstance(batch, Exception):
                    raise batch
                if isinstance(batch, asyncio.Event):
                    await batch.wait()
                    continue
                yield batch
                self.num_yielded += 1
                await asyncio.sleep(0)
        finally:
            self.closed.set()

    async def tokenize(self, request: pb.TokenizeRequest, _caller: Caller) -> pb.TokenizeResponse:
        self.tokenized.append(request)
        ids = self.model.tokenizer.encode(request.text or request.conversation.messages[0].content)
        texts = [self.model.tokenizer.decode([id_]) for id_ in ids]
        return pb.TokenizeResponse(token_ids=ids, max_model_len=self.model.max_model_len, texts=texts)

    async def detokenize(self, request: pb.DetokenizeRequest, _caller: Caller) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=self.model.tokenizer.decode(request.token_ids))


@dataclass
class Site:
    """A started server, its core, and a client."""

    server: HttpServer
    core: WrittenCore
    url: str
    client: httpx.AsyncClient
    config: GatewayConfig
    not_ready: list[str]

    @property
    def asked(self) -> pb.GenerateRequest:
        """The last request that reached the core."""
        return self.core.requests[-1]

    async def chat(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=question(**fields))

    async def post(self, path: str, body: Any) -> httpx.Response:
        return await self.client.post(path, json=body)


@pytest.fixture
def http_config() -> GatewayConfig:
    return GatewayConfig(http_port=0, max_message_bytes=64 * 1024)


@pytest.fixture
async def site(model: ServedModel, http_config: GatewayConfig) -> AsyncIterator[Site]:
    core, not_ready = WrittenCore(model, ANSWER), []
    server = HttpServer(core, http_config, lambda: not_ready[0] if not_ready else None, Access(None))
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    await server.start(listener)
    async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client:
        yield Site(server, core, url, client, http_config, not_ready)
    await server.stop()


def question(text: str = "What is 2+2?", **fields: Any) -> dict[str, Any]:
    return {"model": "pocket", "messages": [{"role": "user", "content": text}], **fields}


def sse(response: httpx.Response) -> list[dict[str, Any]]:
    """The documents of a stream of server-sent events, without [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def started(choice: int = 0, **fields: Any) -> pb.GenerateEvent:
    fields = {"request_id": "r", "model": "pocket", "seed": 1, "prompt_tokens": 12, "cached_tokens": 8, **fields}
    return pb.GenerateEvent(choice=choice, started=pb.Started(**fields))


def thought(text: str, choice: int = 0, ids: Sequence[int] = (40,), **fields: Any) -> pb.GenerateEvent:
    return pb.GenerateEvent(choice=choice, thinking_delta=pb.ThinkingDelta(text=text, token_ids=ids, **fields))


def thoughts_ended(reason: int = pb.ThinkingEnded.REASON_NATURAL, choice: int = 0) -> pb.GenerateEvent:
    cut = reason in (pb.ThinkingEnded.REASON_LENGTH, pb.ThinkingEnded.REASON_STOP)
    ended = pb.ThinkingEnded(reason=reason, token_ids=[] if cut else [9])
    return pb.GenerateEvent(choice=choice, thinking_ended=ended)


def answer(text: str, choice: int = 0, ids: Sequence[int] = (41,), **fields: Any) -> pb.GenerateEvent:
    return pb.GenerateEvent(choice=choice, answer_delta=pb.AnswerDelta(text=text, token_ids=ids, **fields))


def call_started(index: int, name: str) -> pb.GenerateEvent:
    return pb.GenerateEvent(tool_call_start=pb.ToolCallStart(index=index, id=f"call_{index}", name=name))


def call_arguments(index: int, text: str) -> pb.GenerateEvent:
    return pb.GenerateEvent(tool_call_arguments_delta=pb.ToolCallArgumentsDelta(index=index, arguments_json=text))


def finished(reason: int = pb.Finished.REASON_STOP, choice: int = 0, **fields: Any) -> pb.GenerateEvent:
    usage = pb.Usage(prompt_tokens=12, cached_tokens=8, thinking_tokens=5, answer_tokens=3)
    fields = {"phase": pb.PHASE_ANSWER, "usage": usage, **fields}
    return pb.GenerateEvent(choice=choice, finished=pb.Finished(reason=reason, **fields))


ANSWER = [
    [started()],
    [thought("Two and "), thought("two.")],
    [thoughts_ended(), answer("It is"), answer(" 4.")],
    [finished()],
]
CUT_IN_THOUGHTS = [
    [started()],
    [thought("Two and")],
    [
        thoughts_ended(pb.ThinkingEnded.REASON_LENGTH),
        finished(pb.Finished.REASON_LENGTH, phase=pb.PHASE_THINKING),
    ],
]
TWO_CALLS = [
    [started(), thought("I need tools."), thoughts_ended()],
    [call_started(0, "weather"), call_arguments(0, '{"city": '), call_arguments(0, '"Ulm"}')],
    [call_started(1, "clock"), call_arguments(1, "{}")],
    [finished(pb.Finished.REASON_TOOL_CALLS)],
]
