"""POST /v1/completions: text goes on, with no template and nothing taken apart: thoughts are text like any other."""

from __future__ import annotations

import time
from collections.abc import Sequence

from cluster.config import EffortBudgets
from cluster.gateway.http.collected import CollectedChoice, Collector, token_logprobs, total_usage
from cluster.gateway.http.fields import MAX_INT64, Fields
from cluster.gateway.http.forms import DONE, data
from cluster.gateway.http.options import read_options, refuse_not_served
from cluster.gateway.http.parts import (
    Json,
    TokenBytes,
    completion_logprobs_json,
    finish_json,
    prompt_logprobs_json,
    usage_json,
)
from mull.v1 import generation_pb2 as pb


def read_completion(body: Fields, budgets: EffortBudgets) -> pb.GenerateRequest:
    """The request that a text completion stands for. Raises InvalidRequest."""
    refuse_not_served(body, "echo", "suffix", "use_beam_search")
    if body.values.get("best_of") not in (None, body.values.get("n") or 1):
        raise body.refused("best_of", "not supported; leave it out, or send n for more generations")
    request = read_options(body, budgets)
    _read_prompt(request, body)
    request.raw_tool_calls = True
    if (max_tokens := body.integer("max_tokens", -MAX_INT64, MAX_INT64)) is not None:
        request.max_tokens = max_tokens
    if (logprobs := body.count("logprobs")) is not None:
        request.sampling.logprobs = logprobs
    return request


def _read_prompt(request: pb.GenerateRequest, body: Fields) -> None:
    """A text or a list of token ids, or either of them alone in a list."""
    prompt = body.values.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise body.refused("prompt", f"{len(prompt)} prompts; send one a request")
        prompt = prompt[0]
    if isinstance(prompt, str):
        request.raw_prompt = prompt
    elif isinstance(prompt, list):
        request.token_ids.ids.extend(Fields({"prompt": prompt}).integers("prompt"))
    else:
        raise body.wrong("prompt", "a string or a list of token ids")


class CompletionForm:
    """The answer to one text completion. Expects events as raw text."""

    def __init__(self, response_id: str, model: str, token_bytes: TokenBytes, *, include_usage: bool) -> None:
        """`include_usage`: a stream's last chunk tells the usage."""
        about = {"id": response_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._about: Json = about
        self._token_bytes = token_bytes
        self._include_usage = include_usage
        self._usages: list[pb.Usage] = []
        self._offsets: dict[int, int] = {}

    def document(self, collected: Collector) -> Json:
        choices = [self._choice(choice) for choice in collected.choices]
        return {**self._about, "choices": choices, "usage": usage_json(collected.usage)}

    def begin(self) -> bytes:
        return b""

    def write(self, events: Sequence[pb.GenerateEvent]) -> bytes:
        return b"".join(self._write(event) for event in events)

    def end(self) -> bytes:
        if not self._include_usage:
            return DONE
        return data({**self._about, "choices": [], "usage": usage_json(total_usage(self._usages))}) + DONE

    def fail(self, error: Json) -> bytes:
        return data(error) + DONE

    def _choice(self, choice: CollectedChoice) -> Json:
        return {
            "index": choice.index,
            "text": choice.answer_text,
            "logprobs": completion_logprobs_json(choice.answer_logprobs, self._token_bytes, 0),
            **finish_json(choice.finished),
            **prompt_logprobs_json(choice.started),
        }

    def _write(self, event: pb.GenerateEvent) -> bytes:
        match event.WhichOneof("event"):
            case "started" if event.started.prompt_logprobs:
                return self._chunk(event.choice, "", **prompt_logprobs_json(event.started))
            case "answer_delta":
                delta = event.answer_delta
                offset = self._offsets.get(event.choice, 0)
                self._offsets[event.choice] = offset + len(delta.text)
                logprobs = completion_logprobs_json(token_logprobs(delta), self._token_bytes, offset)
                if not delta.text and logprobs is None:
                    return b""
                return self._chunk(event.choice, delta.text, logprobs=logprobs)
            case "finished":
                self._usages.append(event.finished.usage)
                return self._chunk(event.choice, "", **finish_json(event.finished))
            case _:
                return b""

    def _chunk(self, index: int, text: str, **more: object) -> bytes:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None, **more}
        chunk = {**self._about, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return data(chunk)
