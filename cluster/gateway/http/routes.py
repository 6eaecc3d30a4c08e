"""The HTTP routes: OpenAI's, vLLM's beside them, health, and the chat page; each a few lines over the core.

Hop 1 over HTTP. Bodies are read within a bound and are JSON objects; what is wrong with one is an error in OpenAI's
shape. Knows nothing of sockets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from cluster.config import GatewayConfig
from cluster.errors import InvalidRequest, MullError, NotReady
from cluster.gateway.core import GenerationCore
from cluster.gateway.http.answer import Batches, JsonAnswer, StreamedAnswer, WholeAnswer, error_answer
from cluster.gateway.http.chat import ChatForm, read_chat
from cluster.gateway.http.collected import as_raw_text
from cluster.gateway.http.completions import CompletionForm, read_completions
from cluster.gateway.http.door import caller_of
from cluster.gateway.http.errors import BodyTooLarge, BodyTooLate
from cluster.gateway.http.exchanges import Exchanges
from cluster.gateway.http.fields import Fields
from cluster.gateway.http.forms import Form
from cluster.gateway.http.kept import KeptStreams, StreamSource
from cluster.gateway.http.kept_answer import KeptAnswer
from cluster.gateway.http.messages import read_messages, read_tools
from cluster.gateway.http.openapi import openapi_document
from cluster.gateway.http.options import read_template_variables
from cluster.gateway.http.parts import Json
from cluster.gateway.http.prompts import side_by_side
from cluster.gateway.http.response_form import ResponseForm
from cluster.gateway.http.responses import read_response
from cluster.gateway.requests import is_request_id, new_request_id
from cluster.tracing import HEADER
from mull.v1 import generation_pb2 as pb

WhyNotReady = Callable[[], str | None]
"""Why requests cannot be taken now; None where they can."""

STREAM_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
LAST_EVENT_ID = "last-event-id"
_ALLOW = {"allow": "POST"}
PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}


def build_http_app(
    core: GenerationCore, config: GatewayConfig, why_not_ready: WhyNotReady, exchanges: Exchanges, kept: KeptStreams
) -> FastAPI:
    """The application of one gateway."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    routes = Routes(core, config, why_not_ready, exchanges, kept)
    posts: dict[str, Callable[..., Awaitable[Response]]] = {
        "/v1/chat/completions": routes.chat,
        "/v1/completions": routes.complete,
        "/v1/responses": routes.respond,
        "/tokenize": routes.tokenize,
        "/detokenize": routes.detokenize,
    }
    gets: dict[str, Callable[..., Awaitable[Response]]] = {
        **dict.fromkeys(STREAM_PATHS, routes.go_on),
        "/": routes.page,
        "/v1/models": routes.list_models,
        "/v1/models/{name:path}": routes.show_model,
        "/health": routes.health,
        "/ready": routes.ready,
        "/version": routes.version,
        "/openapi.json": routes.openapi,
    }
    for path, handler in posts.items():
        app.add_api_route(path, handler, methods=["POST"], response_model=None)
    for path, handler in gets.items():
        app.add_api_route(path, handler, methods=["GET"], response_model=None)
    for kind in (MullError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    return app


class Routes:
    """The handlers."""

    def __init__(
        self,
        core: GenerationCore,
        config: GatewayConfig,
        why_not_ready: WhyNotReady,
        exchanges: Exchanges,
        kept: KeptStreams,
    ) -> None:
        self._core = core
        self._config = config
        self._why_not_ready = why_not_ready
        self._exchanges = exchanges
        self._kept = kept
        self._start_s = int(time.time())
        self._page = files(__package__).joinpath("chat_page.html").read_text()

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        if LAST_EVENT_ID in request.headers:
            return await self.go_on(request)
        body = await self._body(request)
        asked = read_chat(body, self._config.effort_budgets)
        request_id = _identify(request, asked)
        form = ChatForm(
            f"chatcmpl-{request_id}",
            asked.model or self._core.model.name,
            self._core.model.tokenizer.token_bytes,
            include_usage=_includes_usage(body),
        )
        return self._answer(request, body, asked, form, raw=body.flag("separate_reasoning") is False)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        if LAST_EVENT_ID in request.headers:
            return await self.go_on(request)
        body = await self._body(request)
        prompts = read_completions(body, self._config.effort_budgets)
        first = prompts[0]
        request_id, choices_per_prompt = _identify(request, first), max(1, first.n)
        for asked in prompts:
            # Who asks by the id means the whole request.
            asked.request_id = request_id
        form = CompletionForm(
            f"cmpl-{request_id}",
            first.model or self._core.model.name,
            self._core.model.tokenizer.token_bytes,
            include_usage=_includes_usage(body),
            choices_per_prompt=choices_per_prompt,
        )
        if len(prompts) == 1:
            return self._answer(request, body, first, form, raw=True)

        def batches() -> Batches:
            streams = [_raw_batches(self._stream(request, asked)) for asked in prompts]
            return side_by_side(streams, choices_per_prompt)

        return self._answer_from(request, batches, body, form, request_id)

    async def respond(self, request: Request) -> Response:
        """POST /v1/responses."""
        if LAST_EVENT_ID in request.headers:
            return await self.go_on(request)
        body = await self._body(request)
        asked = read_response(body, self._config.effort_budgets)
        request_id = _identify(request, asked)
        model = self._core.model
        form = ResponseForm(request_id, asked.model or model.name, model.tokenizer.token_bytes, body)
        return self._answer(request, body, asked, form, raw=False)

    async def go_on(self, request: Request) -> Response:
        """GET of a path that streams, with Last-Event-ID: the rest of a stream that is kept."""
        if LAST_EVENT_ID not in request.headers:
            raise HTTPException(405, "POST a request here; GET goes on with a stream, with Last-Event-ID", _ALLOW)
        stream, start = self._kept.find(
            request.headers[LAST_EVENT_ID], caller_of(request).tenant, request.scope["path"]
        )
        return KeptAnswer(self._kept, stream, start, self._exchanges)

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: `prompt`, or `messages` with `tools` and `chat_template_kwargs`."""
        body = await self._body(request)
        asked = pb.TokenizeRequest(model=body.text("model") or "")
        if body.has("messages"):
            asked.conversation.CopyFrom(pb.Conversation(messages=read_messages(body), tools=read_tools(body)))
            asked.chat_template_variables_json = read_template_variables(body)
        elif (prompt := body.text("prompt")) is not None:
            asked.text = prompt
        else:
            raise body.wrong("prompt", "a string, or messages instead")
        done = await self._core.tokenize(asked, caller_of(request))
        found: Json = {"count": len(done.token_ids), "max_model_len": done.max_model_len, "tokens": [*done.token_ids]}
        if body.flag("return_token_strs"):
            found["token_strs"] = [*done.texts]
        return JsonAnswer(found)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: `tokens`."""
        body = await self._body(request)
        asked = pb.DetokenizeRequest(model=body.text("model") or "", token_ids=body.integers("tokens"))
        done = await self._core.detokenize(asked, caller_of(request))
        return JsonAnswer({"prompt": done.text})

    async def list_models(self) -> Response:
        """GET /v1/models."""
        return JsonAnswer({"object": "list", "data": [self._model()]})

    async def show_model(self, name: str) -> Response:
        """GET /v1/models/{name}."""
        if name != self._core.model.name:
            raise HTTPException(404, f"no model {name!r} here, this server has {self._core.model.name!r}")
        return JsonAnswer(self._model())

    async def health(self) -> Response:
        """GET /health: this process answers."""
        return JsonAnswer({"status": "ok"})

    async def ready(self) -> Response:
        """GET /ready: work can be taken."""
        reason = self._why_not_ready()
        return JsonAnswer({"ready": reason is None, "reason": reason}, 200 if reason is None else 503)

    async def version(self) -> Response:
        """GET /version."""
        return JsonAnswer({"version": version("mull")})

    async def openapi(self) -> Response:
        """GET /openapi.json."""
        return JsonAnswer(openapi_document())

    async def page(self) -> Response:
        """GET /: the chat page."""
        return HTMLResponse(self._page, headers=PAGE_HEADERS)

    async def _body(self, request: Request) -> Fields:
        """The body's fields. Raises InvalidRequest, BodyTooLarge, BodyTooLate."""
        limit = self._config.max_message_bytes
        declared = request.headers.get("content-length", "0")
        read = bytearray()
        if not declared.isdigit() or int(declared) <= limit:
            try:
                async with asyncio.timeout(self._config.body_timeout_s):
                    async for piece in request.stream():
                        read += piece
                        if len(read) > limit:
                            break
            except TimeoutError:
                raise BodyTooLate(
                    f"body: not complete within {self._config.body_timeout_s:g} s; send it faster", field="body"
                ) from None
        if len(read) > limit or (declared.isdigit() and int(declared) > limit):
            size = max(len(read), int(declared) if declared.isdigit() else 0)
            raise BodyTooLarge(f"body: {size} bytes or more, the limit is {limit}; send less", field="body")
        return Fields(_object(bytes(read)))

    def _answer(self, request: Request, body: Fields, asked: pb.GenerateRequest, form: Form, *, raw: bool) -> Response:
        def batches() -> Batches:
            stream = self._stream(request, asked)
            return _raw_batches(stream) if raw else stream

        return self._answer_from(request, batches, body, form, asked.request_id)

    def _stream(self, request: Request, asked: pb.GenerateRequest) -> Batches:
        return self._core.stream(asked, caller_of(request), trace_parent=request.headers.get(HEADER))

    def _answer_from(
        self, request: Request, batches: Callable[[], Batches], body: Fields, form: Form, request_id: str
    ) -> Response:
        if (reason := self._why_not_ready()) is not None:
            raise NotReady(f"{reason}; try again later")
        if body.flag("stream") and _is_resumable(body):
            source = StreamSource(batches, form, request_id, caller_of(request).tenant, request.scope["path"])
            return KeptAnswer(self._kept, self._kept.open(source), 0, self._exchanges)
        kind = StreamedAnswer if body.flag("stream") else WholeAnswer
        return kind(batches, form, self._exchanges, request_id)

    def _model(self) -> Json:
        model = self._core.model
        return {
            "id": model.name,
            "object": "model",
            "created": self._start_s,
            "owned_by": "mull",
            "root": model.name,
            "max_model_len": model.max_model_len,
        }


async def _raw_batches(stream: Batches) -> AsyncGenerator[list[pb.GenerateEvent], None]:
    async with aclosing(stream):
        async for events in stream:
            yield as_raw_text(events)


def _identify(request: Request, asked: pb.GenerateRequest) -> str:
    """The client's id of the request, or a new one."""
    given = request.headers.get("x-request-id")
    if given is not None and not is_request_id(given):
        raise InvalidRequest("x-request-id: send at most 128 printable ASCII characters", field="x-request-id")
    asked.request_id = given or new_request_id()
    return asked.request_id


def _includes_usage(body: Fields) -> bool:
    options = body.object("stream_options")
    return options is not None and bool(options.flag("include_usage"))


def _is_resumable(body: Fields) -> bool:
    options = body.object("stream_options")
    return options is not None and bool(options.flag("resumable"))


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"body: is not JSON ({error}); send an object", field="body") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"body: is a JSON {type(value).__name__}; send an object", field="body")
    return value


async def _on_error(request: Request, error: Exception) -> Response:
    given = request.headers.get("x-request-id", "")
    request_id = given if is_request_id(given) else new_request_id()
    if isinstance(error, HTTPException):
        code = "model_not_found" if "name" in request.path_params else None
        said = {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": code}
        return JsonAnswer({"error": said}, error.status_code, {**(error.headers or {})})
    return error_answer(error, request_id)
