"""GET /openapi.json: what the HTTP routes take and give, for people and for programs that make clients or requests.

Written by hand, because bodies are read field by field; the fuzzer of the HTTP port holds it against the server.
"""

from __future__ import annotations

from importlib.metadata import version

from cluster.gateway.http.parts import Json
from cluster.gateway.request_bounds import MAX_MESSAGES, MAX_NAME_CHARS, MAX_STOP_CHARS, MAX_TOOLS
from cluster.gateway.requests import MAX_CHOICES
from cluster.gateway.stopping import MAX_STOPS
from cluster.text.sampling_ranges import MAX_LOGPROBS, MAX_SEED

_MAX_UINT32 = 2**32 - 1


def openapi_document() -> Json:
    """The whole of it."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mull",
            "version": version("mull"),
            "description": "OpenAI's routes, and vLLM's beside them.",
        },
        "paths": {
            "/v1/chat/completions": _post("ChatRequest", "A conversation goes on.", streams=True),
            "/v1/completions": _post("CompletionRequest", "A text goes on, without a chat template.", streams=True),
            "/v1/responses": _post("ResponseRequest", "OpenAI's newer form; nothing is stored.", streams=True),
            "/tokenize": _post("TokenizeRequest", "Token ids of a text or of a conversation."),
            "/detokenize": _post("DetokenizeRequest", "The text of token ids."),
            "/v1/models": _get("The one model."),
            "/v1/models/{name}": _get("The one model.", path_parameter="name"),
            "/health": _get("This process answers.", is_open=True),
            "/ready": _get("Work can be taken.", is_open=True),
            "/version": _get("The version.", is_open=True),
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _get(summary: str, *, path_parameter: str | None = None, is_open: bool = False) -> Json:
    operation: Json = {"summary": summary, "responses": _responses({"application/json": {"type": "object"}})}
    if path_parameter is not None:
        name = {"name": path_parameter, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        operation["parameters"] = [name]
    if is_open:
        operation["security"] = []
    return {"get": operation}


def _post(schema: str, summary: str, *, streams: bool = False) -> Json:
    content = {"application/json": {"type": "object"}}
    if streams:
        content["text/event-stream"] = {"type": "string"}
    body = {"required": True, "content": {"application/json": {"schema": _ref(schema)}}}
    post = {"summary": summary, "requestBody": body, "responses": _responses(content)}
    return {"post": post, "get": _rest_of_stream()} if streams else {"post": post}


def _rest_of_stream() -> Json:
    header = {"name": "Last-Event-ID", "in": "header", "required": True, "schema": {"type": "string"}}
    responses = _responses({"text/event-stream": {"type": "string"}})
    return {"summary": "Goes on with a stream that is kept.", "parameters": [header], "responses": responses}


def _responses(content: dict[str, Json]) -> Json:
    good = {"description": "Done.", "content": {kind: {"schema": schema} for kind, schema in content.items()}}
    refused = {"description": "Refused; `error` says why.", "content": {"application/json": {"schema": _ref("Error")}}}
    away = {"description": "Not ready, or draining.", "content": {"application/json": {"schema": {"type": "object"}}}}
    return {"200": good, "4XX": refused, "503": away}


def _schemas() -> Json:
    text, flag = {"type": "string"}, {"type": "boolean"}
    token_ids = {"type": "array", "items": _integer(0, _MAX_UINT32)}
    messages = {"type": "array", "minItems": 1, "maxItems": MAX_MESSAGES, "items": _message()}
    prompt = {"oneOf": [text, token_ids, {"type": "array", "items": text}]}
    options = _options()
    chat = {
        **options,
        **_tools(),
        "messages": messages,
        "max_completion_tokens": _integer(1),
        "logprobs": flag,
        "top_logprobs": _integer(0),
    }
    response = {
        **options,
        "input": {"oneOf": [text, messages]},
        "instructions": text,
        "max_output_tokens": _integer(1),
    }
    tokenize = {"model": text, "prompt": text, "messages": messages, "return_token_strs": flag}
    return {
        "ChatRequest": _object(["messages"], chat),
        "CompletionRequest": _object(["prompt"], {**options, "prompt": prompt, "logprobs": _integer(0, MAX_LOGPROBS)}),
        "ResponseRequest": _object(["input"], response),
        "TokenizeRequest": _object([], tokenize),
        "DetokenizeRequest": _object([], {"model": text, "tokens": token_ids}),
        "Error": _object(["error"], {"error": _object(["message", "type"], {"message": text, "type": text})}),
    }


def _message() -> Json:
    text = {"type": "string"}
    part = _object(["type", "text"], {"type": {"enum": ["text", "input_text", "output_text"]}, "text": text})
    called = _object(["name"], {"name": {"type": "string", "minLength": 1}, "arguments": text})
    call = _object(["function"], {"id": text, "type": {"enum": ["function"]}, "function": called})
    return _object(
        ["role", "content"],
        {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"oneOf": [text, {"type": "array", "items": part}]},
            "reasoning_content": text,
            "tool_calls": {"type": "array", "items": call},
            "tool_call_id": text,
        },
    )


def _tools() -> Json:
    """What a chat may call, and whether it must."""
    name = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS}
    properties = {"name": name, "description": {"type": "string"}, "parameters": {"type": "object"}}
    tool = _object(["type", "function"], {"type": {"enum": ["function"]}, "function": _object(["name"], properties)})
    return {
        "tools": {"type": "array", "maxItems": MAX_TOOLS, "items": tool},
        "tool_choice": {"oneOf": [{"enum": ["auto", "none", "required"]}, tool]},
        "parallel_tool_calls": {"type": "boolean"},
    }


def _options() -> Json:
    """What all generating routes take."""
    text, flag = {"type": "string"}, {"type": "boolean"}
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
    schema = {"type": "object", "required": ["schema"], "properties": {"name": text, "schema": {"type": "object"}}}
    return {
        "model": text,
        "stream": flag,
        "max_tokens": _integer(1),
        "min_tokens": _integer(0, _MAX_UINT32),
        "n": _integer(1, MAX_CHOICES),
        "temperature": _number(0, 2),
        "top_p": _number(0, 1),
        "top_k": _integer(-1, 2**31 - 1),
        "min_p": _number(0, 1),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "repetition_penalty": _number(0.01, 100),
        "seed": _integer(0, MAX_SEED),
        "stop": {"oneOf": [stop, {"type": "array", "maxItems": MAX_STOPS, "items": stop}]},
        "stop_token_ids": {"type": "array", "items": _integer(0, _MAX_UINT32)},
        "bad_words": {"type": "array", "items": text},
        "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)},
        "priority": _integer(-(2**31), 2**31 - 1),
        "ignore_eos": flag,
        "timeout_seconds": {"type": "number", "exclusiveMinimum": 0},
        "reasoning_effort": {"enum": ["none", "minimal", "low", "medium", "high", "xhigh"]},
        "thinking_budget": _integer(0, _MAX_UINT32),
        "response_format": {
            "type": "object",
            "required": ["type"],
            "properties": {"type": {"enum": ["text", "json_object", "json_schema"]}, "json_schema": schema},
        },
        "structured_outputs": {"type": "object"},
        "chat_template_kwargs": {"type": "object"},
        "metadata": {"type": "object", "additionalProperties": text},
        "stream_options": {"type": "object", "properties": {"include_usage": flag, "resumable": flag}},
        "user": text,
    }


def _object(required: list[str], properties: Json) -> Json:
    """Fields that are not named are not looked at."""
    return {"type": "object", "required": required, "properties": properties}


def _integer(lowest: int, highest: int | None = None) -> Json:
    return {"type": "integer", "minimum": lowest} | ({} if highest is None else {"maximum": highest})


def _number(lowest: float, highest: float) -> Json:
    return {"type": "number", "minimum": lowest, "maximum": highest}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
