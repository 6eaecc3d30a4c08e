"""SamplingOptions ↔ SamplingParams: ranges, and the checkpoint's defaults for what is absent."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

from cluster.errors import InvalidRequest
from cluster.text.generation_defaults import GenerationDefaults
from mull.v1 import generation_pb2 as pb
from workers.step import SamplingParams

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class _Range:
    low: float
    high: float = math.inf
    low_is_open: bool = False

    def __contains__(self, value: float) -> bool:
        # NaN compares false with everything, so it is in no range.
        above = value > self.low if self.low_is_open else value >= self.low
        return above and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        return f"{'(' if self.low_is_open else '['}{self.low:g}, {self.high:g}{')' if math.isinf(self.high) else ']'}"


_RANGES = {
    "temperature": _Range(0),
    "top_k": _Range(0),
    "top_p": _Range(0, 1, low_is_open=True),
    "min_p": _Range(0, 1),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "repetition_penalty": _Range(0, low_is_open=True),
    "seed": _Range(0, MAX_SEED),
    "logprobs": _Range(0, MAX_LOGPROBS),
}


def read_sampling(options: pb.SamplingOptions, defaults: GenerationDefaults) -> SamplingParams:
    """Complete sampling parameters. A seed that is not given is drawn at random. Raises InvalidRequest."""
    given = {descriptor.name: value for descriptor, value in options.ListFields()}
    for name, value in given.items():
        if value not in _RANGES[name]:
            field = f"sampling.{name}"
            raise InvalidRequest(f"{field}: {value:g} is outside of {_RANGES[name]}", field=field)
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
