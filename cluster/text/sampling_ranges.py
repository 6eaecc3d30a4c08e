"""The one table of what sampling fields may be: for clients' requests, generation_config.json and Router messages.

Pure. Knows nothing of where a value came from; the checks that use it say so in their own words.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass

MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers. Reals are compared as float32, which is how messages carry them."""

    low: float
    high: float = math.inf
    low_is_open: bool = False

    def __contains__(self, value: float) -> bool:
        if isinstance(value, float):
            value = _float32(value)
        low = _float32(self.low)
        # NaN compares false with everything, so it is in no range.
        above = value > low if self.low_is_open else value >= low
        return above and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        return f"{'(' if self.low_is_open else '['}{self.low:g}, {self.high:g}{')' if math.isinf(self.high) else ']'}"


SAMPLING_RANGES: Mapping[str, Range] = {
    "temperature": Range(0),
    "top_k": Range(0, 2**31 - 1),
    "top_p": Range(0, 1, low_is_open=True),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    # Beyond these logits overflow or vanish, and logprobs are no numbers any more.
    "repetition_penalty": Range(0.01, 100),
    "seed": Range(0, MAX_SEED),
    "logprobs": Range(0, MAX_LOGPROBS),
}
"""Field of SamplingOptions → its range."""


def _float32(value: float) -> float:
    return ctypes.c_float(value).value
