"""Parts that several of OpenAI's answers share: usage, finish reasons, logprobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.gateway.http.collected import TokenLogprobs
from mull.v1 import generation_pb2 as pb

FINISH_REASONS = {
    pb.Finished.REASON_STOP: "stop",
    pb.Finished.REASON_STOP_TEXT: "stop",
    pb.Finished.REASON_LENGTH: "length",
    pb.Finished.REASON_TOOL_CALLS: "tool_calls",
}

Json = dict[str, Any]
TokenBytes = Mapping[int, bytes]


def usage_json(usage: pb.Usage) -> Json:
    """Thoughts are part of the completion, and counted apart in its details."""
    completion_tokens = usage.thinking_tokens + usage.answer_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": usage.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.thinking_tokens},
    }


def finish_json(finished: pb.Finished | None) -> Json:
    """`finish_reason`, vLLM's `stop_reason`, and notes where there are any."""
    if finished is None:
        return {"finish_reason": None}
    about: Json = {"finish_reason": FINISH_REASONS[finished.reason], "stop_reason": finished.stop or None}
    return {**about, "notes": list(finished.notes)} if finished.notes else about


def logprobs_json(
    answer: Sequence[TokenLogprobs], thoughts: Sequence[TokenLogprobs], token_bytes: TokenBytes
) -> Json | None:
    """`logprobs` of a chat choice: `content` for the answer, and `reasoning_content` of our own for the thoughts."""
    if not answer and not thoughts:
        return None
    found: Json = {"content": [_token_json(*entry, token_bytes) for entry in answer], "refusal": None}
    if thoughts:
        found["reasoning_content"] = [_token_json(*entry, token_bytes) for entry in thoughts]
    return found


def _token_json(token_id: int, logprobs: pb.Logprobs, token_bytes: TokenBytes) -> Json:
    top = [_entry_json(token_bytes[entry.token_id], entry.logprob) for entry in logprobs.top]
    return {**_entry_json(token_bytes[token_id], logprobs.logprob), "top_logprobs": top}


def _entry_json(token: bytes, logprob: float) -> Json:
    return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}


def completion_logprobs_json(entries: Sequence[TokenLogprobs], token_bytes: TokenBytes, offset: int) -> Json | None:
    """`logprobs` of a text completion: four lists, one entry a token; `offset` is where the first one's text begins."""
    if not entries:
        return None
    tokens = [token_bytes[token_id].decode("utf-8", "replace") for token_id, _ in entries]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [logprobs.logprob for _, logprobs in entries],
        "top_logprobs": [{top.text: top.logprob for top in logprobs.top} for _, logprobs in entries],
        "text_offset": offsets,
    }


def prompt_logprobs_json(started: pb.Started) -> Json:
    """`prompt_logprobs`, null for the first token, which nothing comes before; absent where none were asked for."""
    if not started.prompt_logprobs:
        return {}
    entries: list[Json | None] = [None]
    for logprobs in started.prompt_logprobs:
        top = [{"token_id": top.token_id, "token": top.text, "logprob": top.logprob} for top in logprobs.top]
        entries.append({"logprob": logprobs.logprob, "top_logprobs": top})
    return {"prompt_logprobs": entries}
