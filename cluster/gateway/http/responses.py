"""POST /v1/responses: OpenAI's newer request → GenerateRequest. Nothing is stored: each request brings its history."""

from __future__ import annotations

from cluster.config import EffortBudgets
from cluster.gateway.http.fields import MAX_INT64, Fields
from cluster.gateway.http.messages import arguments_of, read_tool_choice, read_tools, role_of, text_of
from cluster.gateway.http.options import read_options, refuse_not_served
from mull.v1 import generation_pb2 as pb

_WITH_LOGPROBS = "message.output_text.logprobs"


def read_response(body: Fields, budgets: EffortBudgets) -> pb.GenerateRequest:
    """The request that a response stands for. Raises InvalidRequest."""
    refuse_not_served(body, "previous_response_id", "background", "conversation", "prompt")
    request = read_options(body, budgets)
    if request.n > 1:
        raise body.refused("n", "a response is one generation; use /v1/chat/completions for more")
    tools = read_tools(body)
    request.conversation.CopyFrom(pb.Conversation(messages=_messages(body), tools=tools))
    if (choice := read_tool_choice(body)) is not None and (tools or choice.mode != pb.ToolChoice.MODE_AUTO):
        request.tool_choice.CopyFrom(choice)
    for name in ("max_tokens", "max_output_tokens"):
        if (max_tokens := body.integer(name, -MAX_INT64, MAX_INT64)) is not None:
            request.max_tokens = max_tokens
    request.raw_tool_calls = not tools
    top_logprobs = body.count("top_logprobs")
    if top_logprobs or _WITH_LOGPROBS in body.texts("include"):
        request.sampling.logprobs = top_logprobs or 0
    return request


def _messages(body: Fields) -> list[pb.Message]:
    messages = []
    if instructions := body.text("instructions"):
        messages.append(pb.Message(role="system", content=instructions))
    if isinstance(body.values.get("input"), str):
        return [*messages, pb.Message(role="user", content=body.required_text("input"))]
    if not body.list("input"):
        raise body.wrong("input", "a string, or a list with at least one item")
    for item in body.objects("input"):
        _add_item(messages, item)
    return messages


def _add_item(messages: list[pb.Message], item: Fields) -> None:
    """One item; what an assistant thought, said and called in a row is one turn for the template."""
    match item.text("type") or "message":
        case "message":
            role, text = role_of(item), text_of(item, "content")
            turn = _assistant_turn(messages) if role == "assistant" else _new(messages, role)
            turn.content += text
        case "reasoning":
            _assistant_turn(messages).reasoning_content += text_of_reasoning(item)
        case "function_call":
            call = pb.ToolCall(
                id=item.text("call_id") or "", name=item.required_text("name"), arguments_json=arguments_of(item)
            )
            _assistant_turn(messages).tool_calls.append(call)
        case "function_call_output":
            turn = _new(messages, "tool")
            turn.tool_call_id = item.text("call_id") or ""
            turn.content = text_of(item, "output")
        case kind:
            raise item.refused("type", f"{kind!r} is not served; send messages, function calls and their outputs")


def text_of_reasoning(item: Fields) -> str:
    """The thoughts in a reasoning item of an earlier response."""
    return "".join(part.text("text") or "" for part in item.objects("content"))


def _assistant_turn(messages: list[pb.Message]) -> pb.Message:
    if messages and messages[-1].role == "assistant":
        return messages[-1]
    return _new(messages, "assistant")


def _new(messages: list[pb.Message], role: str) -> pb.Message:
    messages.append(pb.Message(role=role))
    return messages[-1]
