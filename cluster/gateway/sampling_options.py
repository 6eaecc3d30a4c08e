"""SamplingOptions ↔ SamplingParams: checked, and the checkpoint's defaults for what is absent."""

from __future__ import annotations

import secrets

from cluster.errors import InvalidRequest
from cluster.text.generation_defaults import GenerationDefaults
from cluster.text.sampling_ranges import SAMPLING_RANGES
from mull.v1 import generation_pb2 as pb
from workers.step import SamplingParams


def read_sampling(options: pb.SamplingOptions, defaults: GenerationDefaults) -> SamplingParams:
    """Complete sampling parameters. A seed that is not given is drawn at random. Raises InvalidRequest."""
    given = {descriptor.name: value for descriptor, value in options.ListFields()}
    for name, value in given.items():
        if value not in SAMPLING_RANGES[name]:
            field = f"sampling.{name}"
            raise InvalidRequest(f"{field}: {value:g} is outside of {SAMPLING_RANGES[name]}", field=field)
    return SamplingParams(
        temperature=given.get("temperature", defaults.temperature),
        top_k=given.get("top_k", defaults.top_k),
        top_p=given.get("top_p", defaults.top_p),
        min_p=given.get("min_p", defaults.min_p),
        presence_penalty=given.get("presence_penalty", 0.0),
        frequency_penalty=given.get("frequency_penalty", 0.0),
        repetition_penalty=given.get("repetition_penalty", defaults.repetition_penalty),
        seed=given["seed"] if "seed" in given else secrets.randbits(63),
        num_logprobs=given.get("logprobs"),
    )


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
