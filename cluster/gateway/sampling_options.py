"""SamplingOptions ↔ SamplingParams: checked, and the checkpoint's defaults for what is absent."""

from __future__ import annotations

import secrets

from cluster.errors import InvalidRequest
from cluster.text.generation_defaults import GenerationDefaults
from cluster.text.sampling_ranges import MAX_LOGPROBS, MAX_SEED, SAMPLING_RANGES, Range
from cluster.text.tokenizer import Tokenizer
from mull.v1 import generation_pb2 as pb
from workers.step import SamplingParams

MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 64
_LOGIT_BIAS = Range(-100, 100)


def read_sampling(options: pb.SamplingOptions, defaults: GenerationDefaults, n: int = 1) -> SamplingParams:
    """Complete sampling parameters of the first of `n` generations; the others count the seed up.

    A seed that is not given is drawn at random. Raises InvalidRequest.
    """
    given = {descriptor.name: value for descriptor, value in options.ListFields() if descriptor.name in SAMPLING_RANGES}
    for name, value in given.items():
        if value not in SAMPLING_RANGES[name]:
            field = f"sampling.{name}"
            raise InvalidRequest(f"{field}: {value:g} is outside of {SAMPLING_RANGES[name]}", field=field)
    if given.get("seed", 0) + n - 1 > MAX_SEED:
        raise InvalidRequest(
            f"sampling.seed: {given['seed']} + {n - 1} for the last generation is over {MAX_SEED}; lower it",
            field="sampling.seed",
        )
    return SamplingParams(
        temperature=given.get("temperature", defaults.temperature),
        top_k=given.get("top_k", defaults.top_k),
        top_p=given.get("top_p", defaults.top_p),
        min_p=given.get("min_p", defaults.min_p),
        presence_penalty=given.get("presence_penalty", 0.0),
        frequency_penalty=given.get("frequency_penalty", 0.0),
        repetition_penalty=given.get("repetition_penalty", defaults.repetition_penalty),
        seed=given["seed"] if "seed" in given else secrets.randbelow(MAX_SEED - n + 2),
        num_logprobs=given.get("logprobs"),
    )


def read_logit_bias(options: pb.SamplingOptions, vocab_size: int) -> dict[int, float]:
    """What is added to the logits of tokens. Raises InvalidRequest."""
    bias = dict(options.logit_bias)
    if len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"sampling.logit_bias: {len(bias)} tokens; send at most {MAX_LOGIT_BIAS}", field="sampling.logit_bias"
        )
    for token_id, value in bias.items():
        field = f"sampling.logit_bias[{token_id}]"
        if token_id >= vocab_size:
            raise InvalidRequest(f"{field}: {token_id} is no token; the vocabulary has {vocab_size}", field=field)
        if value not in _LOGIT_BIAS:
            raise InvalidRequest(f"{field}: {value:g} is outside of {_LOGIT_BIAS}", field=field)
    return bias


def read_bad_words(options: pb.SamplingOptions, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token ids of each word as it stands, and as it follows a space. Raises InvalidRequest."""
    words = options.bad_words
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequest(
            f"sampling.bad_words: {len(words)} words; send at most {MAX_BAD_WORDS}", field="sampling.bad_words"
        )
    encoded: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        if not word.strip():
            field = f"sampling.bad_words[{index}]"
            raise InvalidRequest(f"{field}: blank; send a word", field=field)
        encoded[tuple(tokenizer.encode(word))] = None
        encoded[tuple(tokenizer.encode(" " + word.lstrip(" ")))] = None
    return tuple(encoded)


def read_prompt_logprobs(options: pb.SamplingOptions) -> int | None:
    """How many of the likeliest tokens to tell of at each place of the prompt. Raises InvalidRequest."""
    if not options.HasField("prompt_logprobs"):
        return None
    if options.prompt_logprobs > MAX_LOGPROBS:
        raise InvalidRequest(
            f"sampling.prompt_logprobs: {options.prompt_logprobs} is outside of [0, {MAX_LOGPROBS}]",
            field="sampling.prompt_logprobs",
        )
    return options.prompt_logprobs


def default_options(defaults: GenerationDefaults) -> pb.SamplingOptions:
    """What absent fields mean, for ListModels."""
    return pb.SamplingOptions(
        temperature=defaults.temperature,
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        min_p=defaults.min_p,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=defaults.repetition_penalty,
    )
