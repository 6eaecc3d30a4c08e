"""POST /v1/chat/completions: OpenAI's request → GenerateRequest, and the events → its answer, whole or streamed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cluster.config import EffortBudgets
from cluster.gateway.http.collected import CollectedChoice, Collector, token_logprobs, total_usage
from cluster.gateway.http.fields import MAX_INT64, Fields
from cluster.gateway.http.forms import DONE, data
from cluster.gateway.http.messages import read_messages, read_tool_choice, read_tools
from cluster.gateway.http.options import read_options, refuse_not_served
from cluster.gateway.http.parts import (
    Json,
    TokenBytes,
    finish_json,
    logprobs_json,
    prompt_logprobs_json,
    usage_json,
)
from mull.v1 import generation_pb2 as pb


def read_chat(body: Fields, budgets: EffortBudgets) -> pb.GenerateRequest:
    """The request that a chat completion stands for. Raises InvalidRequest."""
    refuse_not_served(body, "echo", "use_beam_search", "functions")
    request = read_options(body, budgets)
    tools = read_tools(body)
    request.conversation.CopyFrom(pb.Conversation(messages=read_messages(body), tools=tools))
    if (choice := read_tool_choice(body)) is not None and (tools or choice.mode != pb.ToolChoice.MODE_AUTO):
        request.tool_choice.CopyFrom(choice)
    for name in ("max_tokens", "max_completion_tokens"):
        if (max_tokens := body.integer(name, -MAX_INT64, MAX_INT64)) is not None:
            request.max_tokens = max_tokens
    # Markup in the answer is the client's own business where it told the server of no tools, or wants to parse it.
    request.raw_tool_calls = not tools or body.flag("separate_reasoning") is False
    if body.flag("logprobs"):
        request.sampling.logprobs = body.count("top_logprobs") or 0
    elif body.count("top_logprobs"):
        raise body.refused("top_logprobs", "needs logprobs: true beside it")
    return request


class ChatForm:
    """The answer to one chat completion."""

    def __init__(self, response_id: str, model: str, token_bytes: TokenBytes, *, include_usage: bool) -> None:
        """`include_usage`: a stream's last chunk tells the usage."""
        self._about: Json = {"id": response_id, "created": int(time.time()), "model": model}
        self._token_bytes = token_bytes
        self._include_usage = include_usage
        self._usages: list[pb.Usage] = []

    def document(self, collected: Collector) -> Json:
        return {
            **self._about,
            "object": "chat.completion",
            "choices": [self._choice(choice) for choice in collected.choices],
            "usage": usage_json(collected.usage),
        }

    def begin(self) -> bytes:
        return b""

    def write(self, events: Sequence[pb.GenerateEvent]) -> bytes:
        return b"".join(self._write(event) for event in events)

    def end(self) -> bytes:
        if not self._include_usage:
            return DONE
        usage = usage_json(total_usage(self._usages))
        return data({**self._about, "object": "chat.completion.chunk", "choices": [], "usage": usage}) + DONE

    def fail(self, error: Json) -> bytes:
        return data(error) + DONE

    def _choice(self, choice: CollectedChoice) -> Json:
        message: Json = {"role": "assistant", "content": choice.answer_text}
        if thoughts := choice.thinking_text:
            message |= {"reasoning_content": thoughts, "reasoning": thoughts}
        if choice.tool_calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in choice.tool_calls
            ]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": logprobs_json(choice.answer_logprobs, choice.thinking_logprobs, self._token_bytes),
            **finish_json(choice.finished),
            **prompt_logprobs_json(choice.started),
        }

    def _write(self, event: pb.GenerateEvent) -> bytes:
        match event.WhichOneof("event"):
            case "thinking_delta":
                thoughts = event.thinking_delta
                delta = {"reasoning_content": thoughts.text, "reasoning": thoughts.text}
                return self._text_chunk(event.choice, delta, thoughts)
            case "answer_delta":
                return self._text_chunk(event.choice, {"content": event.answer_delta.text}, event.answer_delta)
            case "started":
                more = prompt_logprobs_json(event.started)
                return self._chunk(event.choice, {"role": "assistant", "content": ""}, **more)
            case "tool_call_start":
                start = event.tool_call_start
                function = {"name": start.name, "arguments": ""}
                call = {"index": start.index, "id": start.id, "type": "function", "function": function}
                return self._chunk(event.choice, {"tool_calls": [call]})
            case "tool_call_arguments_delta" if event.tool_call_arguments_delta.arguments_json:
                piece = event.tool_call_arguments_delta
                call = {"index": piece.index, "function": {"arguments": piece.arguments_json}}
                return self._chunk(event.choice, {"tool_calls": [call]})
            case "finished":
                self._usages.append(event.finished.usage)
                return self._chunk(event.choice, {}, **finish_json(event.finished))
            case _:
                return b""

    def _text_chunk(self, index: int, delta: Json, said: pb.ThinkingDelta | pb.AnswerDelta) -> bytes:
        logprobs = token_logprobs(said)
        if not said.text and not logprobs:
            return b""
        if not logprobs:
            return self._chunk(index, delta)
        of_answer, of_thoughts = ([], logprobs) if isinstance(said, pb.ThinkingDelta) else (logprobs, [])
        return self._chunk(index, delta, logprobs=logprobs_json(of_answer, of_thoughts, self._token_bytes))

    def _chunk(self, index: int, delta: Json, **more: object) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        chunk = {**self._about, "object": "chat.completion.chunk", "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return data(chunk)
