"""POST /v1/completions: text goes on, with no template and nothing taken apart: thoughts are text like any other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

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

MAX_PROMPTS = 64


def read_completions(body: Fields, budgets: EffortBudgets) -> list[pb.GenerateRequest]:
    """One request for each prompt of a text completion, otherwise the same. Raises InvalidRequest."""
    request = _read_without_prompt(body, budgets)
    return [_with_prompt(request, prompt) for prompt in _prompts(body)]


def _read_without_prompt(body: Fields, budgets: EffortBudgets) -> pb.GenerateRequest:
    refuse_not_served(body, "echo", "suffix", "use_beam_search")
    if body.values.get("best_of") not in (None, body.values.get("n") or 1):
        raise body.refused("best_of", "not supported; leave it out, or send n for more generations")
    request = read_options(body, budgets)
    request.raw_tool_calls = True
    if (max_tokens := body.integer("max_tokens", -MAX_INT64, MAX_INT64)) is not None:
        request.max_tokens = max_tokens
    if (logprobs := body.count("logprobs")) is not None:
        request.sampling.logprobs = logprobs
    return request


def _prompts(body: Fields) -> list[str | list[int]]:
    """A text or a list of token ids, or a list of those."""
    given = body.values.get("prompt")
    prompts: list[Any] = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if len(prompts) > MAX_PROMPTS:
        raise body.refused("prompt", f"{len(prompts)} prompts; send at most {MAX_PROMPTS} a request")
    if not all(isinstance(prompt, (str, list)) for prompt in prompts):
        raise body.wrong("prompt", "a string, a list of token ids, or a list of strings or of such lists")
    return prompts


def _with_prompt(request: pb.GenerateRequest, prompt: str | list[int]) -> pb.GenerateRequest:
    asked = pb.GenerateRequest()
    asked.CopyFrom(request)
    if isinstance(prompt, str):
        asked.raw_prompt = prompt
    else:
        asked.token_ids.ids.extend(Fields({"prompt": prompt}).integers("prompt"))
    return asked


class CompletionForm:
    """The answer to one text completion. Expects events as raw text."""

    def __init__(
        self, response_id: str, model: str, token_bytes: TokenBytes, *, include_usage: bool, choices_per_prompt: int
    ) -> None:
        """`include_usage`: a stream's last chunk tells the usage."""
        about = {"id": response_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._about: Json = about
        self._token_bytes = token_bytes
        self._include_usage = include_usage
        self._choices_per_prompt = choices_per_prompt
        self._usages: dict[int, pb.Usage] = {}
        """Of each choice that has finished."""
        self._offsets: dict[int, int] = {}

    def document(self, collected: Collector) -> Json:
        choices = [self._choice(choice) for choice in collected.choices]
        self._usages = {choice.index: choice.finished.usage for choice in collected.choices if choice.finished}
        return {**self._about, "choices": choices, "usage": self._usage()}

    def begin(self) -> bytes:
        return b""

    def write(self, events: Sequence[pb.GenerateEvent]) -> bytes:
        return b"".join(self._write(event) for event in events)

    def end(self) -> bytes:
        if not self._include_usage:
            return DONE
        return data({**self._about, "choices": [], "usage": self._usage()}) + DONE

    def fail(self, error: Json) -> bytes:
        return data(error) + DONE

    def _usage(self) -> Json:
        by_prompt: dict[int, list[pb.Usage]] = {}
        for choice, usage in self._usages.items():
            by_prompt.setdefault(choice // self._choices_per_prompt, []).append(usage)
        return usage_json(_sum(total_usage(usages) for usages in by_prompt.values()))

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
                self._usages[event.choice] = event.finished.usage
                return self._chunk(event.choice, "", **finish_json(event.finished))
            case _:
                return b""

    def _chunk(self, index: int, text: str, **more: object) -> bytes:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None, **more}
        chunk = {**self._about, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return data(chunk)


def _sum(usages: Iterable[pb.Usage]) -> pb.Usage:
    total = pb.Usage()
    for usage in usages:
        total.prompt_tokens += usage.prompt_tokens
        total.cached_tokens += usage.cached_tokens
        total.thinking_tokens += usage.thinking_tokens
        total.answer_tokens += usage.answer_tokens
    return total
