"""PreparedRequest → Submit: what a copy of the model is asked for."""

from __future__ import annotations

from cluster.gateway.requests import PreparedRequest
from mull.v1 import router_pb2 as pb


def submit_message(request: PreparedRequest, choice: int) -> pb.Submit:
    """One of a request's generations, without a key and without output."""
    return pb.Submit(
        request_id=request.request_id,
        prompt_ids=request.prompt_ids,
        sampling=_sampling_message(request, choice),
        max_tokens=request.max_tokens,
        stop_token_ids=sorted(request.stop_token_ids),
        starts_thinking=request.starts_thinking,
        thinking_budget=request.thinking_budget,
        close_thinking_ids=request.close_thinking_ids,
        min_tokens=request.min_tokens,
        priority=request.priority,
        cache_salt=request.cache_salt,
        grammar=request.grammar,
        bad_words=[pb.TokenSequence(ids=ids) for ids in request.bad_words],
        num_prompt_logprobs=request.num_prompt_logprobs,
        trace_parent=request.trace_parent,
    )


def _sampling_message(request: PreparedRequest, choice: int) -> pb.RouterSampling:
    params = request.sampling
    return pb.RouterSampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=request.seed_of(choice),
        num_logprobs=params.num_logprobs,
        logit_bias=request.logit_bias,
    )
