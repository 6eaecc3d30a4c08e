"""The fields that all generating routes share → pb.GenerateRequest: sampling, limits, stops, budgets, formats.

Ranges are the core's business: here types are read and names are mapped, OpenAI's, vLLM's and SGLang's.
"""

from __future__ import annotations

from google.protobuf.message import Message

from cluster.config import EffortBudgets
from cluster.errors import InvalidRequest
from cluster.gateway.http.fields import MAX_INT64, Fields
from cluster.gateway.http.messages import json_text
from mull.v1 import generation_pb2 as pb

_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_GUIDED = ("json", "regex", "choice", "grammar", "json_object")


def read_options(body: Fields, budgets: EffortBudgets) -> pb.GenerateRequest:
    """A request with everything but its prompt, its tools and its output limit. Raises InvalidRequest."""
    request = pb.GenerateRequest(model=body.text("model") or "", sampling=_sampling(body))
    _put(request, "n", body.count("n"))
    _put(request, "priority", body.integer("priority"))
    _put(request, "min_tokens", body.count("min_tokens"))
    _put(request, "ignore_eos", body.flag("ignore_eos"))
    _put(request, "parallel_tool_calls", body.flag("parallel_tool_calls"))
    _put(request, "timeout_seconds", body.number("timeout_seconds"))
    request.stop.extend(body.texts("stop"))
    request.stop_token_ids.extend(body.integers("stop_token_ids"))
    _read_notes(request, body)
    request.chat_template_variables_json = read_template_variables(body)
    _read_budget(request, body, budgets)
    if (response_format := _response_format(body)) is not None:
        request.response_format.CopyFrom(response_format)
    return request


def refuse_not_served(body: Fields, *names: str) -> None:
    """Raise InvalidRequest for a field that a client relies on and that is not served; false is as absent."""
    for name in names:
        if body.values.get(name):
            raise body.refused(name, "not supported; leave it out")
    if body.values.get("best_of") not in (None, body.values.get("n") or 1):
        raise body.refused("best_of", "not supported; leave it out, or send n for more generations")


def _put(message: Message, name: str, value: object) -> None:
    if value is not None:
        setattr(message, name, value)


def _sampling(body: Fields) -> pb.SamplingOptions:
    sampling = pb.SamplingOptions()
    for name in _NUMBERS:
        _put(sampling, name, body.number(name))
    top_k = body.integer("top_k")
    # vLLM's and SGLang's word for "no limit".
    _put(sampling, "top_k", 0 if top_k == -1 else top_k)
    _put(sampling, "seed", body.integer("seed", 0, MAX_INT64))
    _put(sampling, "prompt_logprobs", body.count("prompt_logprobs"))
    sampling.bad_words.extend(body.texts("bad_words"))
    for token_id, bias in _logit_bias(body).items():
        sampling.logit_bias[token_id] = bias
    return sampling


def _logit_bias(body: Fields) -> dict[int, float]:
    fields = body.object("logit_bias")
    if fields is None:
        return {}
    found = {}
    for key in fields.values:
        # Ids have ten digits at most, and Python itself refuses to read thousands.
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < 2**32):
            raise fields.refused(key, "is no token id; send ids as keys")
        found[int(key)] = fields.number(key) or 0.0
    return found


def _read_notes(request: pb.GenerateRequest, body: Fields) -> None:
    if (metadata := body.object("metadata")) is not None:
        for key in metadata.values:
            request.metadata[key] = metadata.text(key) or ""
    if (user := body.text("user")) is not None:
        request.metadata["user"] = user


def read_template_variables(body: Fields) -> str:
    """`chat_template_kwargs` as JSON; empty where there are none. Raises InvalidRequest."""
    variables = body.object("chat_template_kwargs")
    return json_text(variables.values) if variables is not None and variables.values else ""


def _read_budget(request: pb.GenerateRequest, body: Fields, budgets: EffortBudgets) -> None:
    """The most explicit word wins: a number of tokens, then thinking on or off, then an effort."""
    for name in ("thinking_budget", "thinking_token_budget"):
        if (tokens := body.count(name)) is not None:
            request.thinking_budget = tokens
            return
    variables = body.object("chat_template_kwargs")
    thinks = None if variables is None else variables.flag("enable_thinking")
    thinks = body.flag("enable_thinking") if thinks is None else thinks
    if thinks is False:
        # Where the template leaves the thoughts out by itself, there is nothing for the budget to cut.
        request.thinking_budget = 0
        return
    reasoning = body.object("reasoning")
    source, name = (body, "reasoning_effort") if reasoning is None else (reasoning, "effort")
    if (effort := source.text(name)) is not None:
        if effort not in EffortBudgets.model_fields:
            known = ", ".join(EffortBudgets.model_fields)
            raise source.refused(name, f"{effort!r} is unknown; send one of {known}")
        _put(request, "thinking_budget", getattr(budgets, effort))


def _response_format(body: Fields) -> pb.ResponseFormat | None:
    found = [*_openai_format(body), *_guided(body)]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise InvalidRequest(f"{found[1][0]}: {names} contradict each other; send one", field=found[1][0])
    if not found:
        return None
    chosen = found[0][1]
    scopes = {"answer_only": pb.ResponseFormat.SCOPE_ANSWER_ONLY, "all": pb.ResponseFormat.SCOPE_ALL}
    if (scope := body.text("structured_outputs_scope")) is not None:
        if scope not in scopes:
            raise body.refused("structured_outputs_scope", f"{scope!r} is unknown; send one of {', '.join(scopes)}")
        chosen.scope = scopes[scope]
    return chosen


def _openai_format(body: Fields) -> list[tuple[str, pb.ResponseFormat]]:
    """`response_format` of chat completions, or `text.format` of /v1/responses."""
    holder = body.object("text") if body.has("text") else None
    name, fields = ("response_format", body.object("response_format"))
    if holder is not None and holder.has("format"):
        name, fields = "text.format", holder.object("format")
    if fields is None:
        return []
    match fields.text("type"):
        case "text":
            return []
        case "json_object":
            return [(name, pb.ResponseFormat(json_object=pb.JsonObject()))]
        case "json_schema":
            return [(name, pb.ResponseFormat(json_schema=_schema(fields.object("json_schema") or fields)))]
        case kind:
            raise fields.refused("type", f"{kind!r} is unknown; send text, json_object or json_schema")


def _schema(fields: Fields) -> str:
    value = fields.values.get("schema")
    if not isinstance(value, (dict, bool)):
        raise fields.wrong("schema", "a JSON schema")
    return json_text(value)


def _guided(body: Fields) -> list[tuple[str, pb.ResponseFormat]]:
    """vLLM's names, old (`guided_regex`) and new (`structured_outputs.regex`)."""
    found = [(f"guided_{kind}", _guide(body, f"guided_{kind}", kind)) for kind in _GUIDED if body.has(f"guided_{kind}")]
    fields = body.object("structured_outputs")
    if fields is not None:
        found += [(fields.path(kind), _guide(fields, kind, kind)) for kind in _GUIDED if fields.has(kind)]
    return [(name, guide) for name, guide in found if guide.WhichOneof("format")]


def _guide(fields: Fields, name: str, kind: str) -> pb.ResponseFormat:
    if kind == "json":
        value = fields.values[name]
        return pb.ResponseFormat(json_schema=value if isinstance(value, str) else json_text(value))
    if kind == "choice":
        return pb.ResponseFormat(choices=pb.Choices(texts=fields.texts(name)))
    if kind == "json_object":
        return pb.ResponseFormat(json_object=pb.JsonObject()) if fields.flag(name) else pb.ResponseFormat()
    text = fields.required_text(name)
    return pb.ResponseFormat(regex=text) if kind == "regex" else pb.ResponseFormat(grammar=text)
