"""What is asked of the servers: requests with their arrivals and lengths, drawn by a seed or read from a trace."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

from cluster.errors import ConfigError

LENGTH_SPREAD = 0.5
"""Standard deviation over mean of drawn lengths: lognormal, as lengths of prompts and thoughts are about."""
_DRAWS = 4096


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, and the output that its model gives."""

    time_s: float
    prompt_tokens: int
    thinking_tokens: int
    """The closing tag included; 0: it answers at once."""
    answer_tokens: int
    tenant: str = ""

    @property
    def output_tokens(self) -> int:
        return self.thinking_tokens + self.answer_tokens


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean lengths of a load, in tokens."""

    prompt: int
    thinking: int
    answer: int

    @property
    def total(self) -> int:
        return self.prompt + self.thinking + self.answer

    @property
    def mean_held(self) -> int:
        """Tokens of KV that a stream holds on average over its life: it grows from the prompt to all of it."""
        return self.prompt + (self.thinking + self.answer) // 2


Rate = Callable[[float], float]
"""Seconds since the start -> requests a second."""


def steady(rate_per_s: float) -> Rate:
    return lambda _time_s: rate_per_s


def diurnal(mean_per_s: float, *, day_s: float = 86400.0, swing: float = 0.6) -> Rate:
    """A sine of one day, lowest at its start."""
    return lambda time_s: mean_per_s * (1 - swing * math.cos(2 * math.pi * time_s / day_s))


BURST_EVERY_S, BURST_LASTS_S, BURST_FACTOR = 300.0, 30.0, 5.0
BURST_OF_MEAN = BURST_FACTOR / (1 + (BURST_FACTOR - 1) * BURST_LASTS_S / BURST_EVERY_S)
"""The rate of a burst, times the mean."""


def bursty(mean_per_s: float) -> Rate:
    """BURST_FACTOR times the base rate for a while, again and again, with the mean that is asked for."""
    most = mean_per_s * BURST_OF_MEAN
    return lambda time_s: most if time_s % BURST_EVERY_S < BURST_LASTS_S else most / BURST_FACTOR


def later(rate: Rate, by_s: float, *, before_per_s: float) -> Rate:
    """It begins at that time."""
    return lambda time_s: rate(time_s - by_s) if time_s >= by_s else before_per_s


def doubled(rate: Rate, at_s: float) -> Rate:
    """Twice as much from then on."""
    return lambda time_s: rate(time_s) * (2 if time_s >= at_s else 1)


def drawn(
    rate: Rate, peak_per_s: float, lengths: Lengths, *, seed: int, context: int, tenants: int = 1
) -> Iterator[Arrival]:
    """A Poisson process of this rate (by thinning: `peak_per_s` is its largest), without an end.

    Lengths are drawn around their means and cut to the context, thoughts first. Tenants share the load by Zipf's law.
    """
    draw = random.Random(seed)
    weights = [1 / (index + 1) for index in range(tenants)]
    names = [f"tenant-{index + 1}" for index in range(tenants)]
    now_s = 0.0
    while True:
        now_s += draw.expovariate(peak_per_s)
        if draw.random() * peak_per_s > rate(now_s):
            continue
        tenant = draw.choices(names, weights)[0] if tenants > 1 else ""
        yield _cut(
            now_s, [_length(draw, mean) for mean in (lengths.prompt, lengths.thinking, lengths.answer)], context, tenant
        )


def _length(draw: random.Random, mean: int) -> int:
    if mean == 0:
        return 0
    sigma = math.sqrt(math.log(1 + LENGTH_SPREAD**2))
    return max(1, round(draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))


def _cut(time_s: float, lengths: list[int], context: int, tenant: str) -> Arrival:
    prompt, thinking, answer = lengths
    prompt = min(prompt, max(1, context - 2))
    answer = min(max(1, answer), context - prompt)
    return Arrival(time_s, prompt, min(thinking, context - prompt - answer), answer, tenant)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What `drawn` makes of mean lengths."""

    output_tokens: float
    """On average."""
    cut_share: float
    """Of the requests: they were longer than the context."""


@cache
def mean_drawn(lengths: Lengths, context: int) -> Drawn:
    """Of as many draws as say it to a percent."""
    requests = list(islice(drawn(steady(1.0), 1.0, lengths, seed=0, context=context), _DRAWS))
    long = sum(one.prompt_tokens + one.output_tokens >= context for one in requests)
    return Drawn(output_tokens=sum(one.output_tokens for one in requests) / _DRAWS, cut_share=long / _DRAWS)


def read_trace(file: Path) -> list[Arrival]:
    """Lines like {"time_s": 0.5, "prompt": 2000, "thinking": 8000, "answer": 1000}; tenant, too. Raises ConfigError.

    Times may be of any clock: the first request comes at 0.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); give a file with one JSON object a line") from error
    arrivals = [_parse(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not arrivals:
        raise ConfigError(f"{file}: has no requests; give one JSON object a line")
    first_s = min(arrival.time_s for arrival in arrivals)
    begun = [replace(arrival, time_s=arrival.time_s - first_s) for arrival in arrivals]
    return sorted(begun, key=lambda arrival: arrival.time_s)


def _parse(file: Path, number: int, line: str) -> Arrival:
    try:
        values = json.loads(line)
        arrival = Arrival(
            float(values["time_s"]),
            int(values["prompt"]),
            int(values.get("thinking", 0)),
            int(values["answer"]),
            str(values.get("tenant", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file}:{number}: no request ({type(error).__name__}: {error}); write "
            '{"time_s": 0.5, "prompt": 2000, "thinking": 8000, "answer": 1000}'
        ) from error
    if arrival.time_s < 0 or arrival.prompt_tokens < 1 or arrival.thinking_tokens < 0 or arrival.answer_tokens < 1:
        raise ConfigError(f"{file}:{number}: time_s and thinking are 0 or more, prompt and answer 1 or more")
    return arrival


def mean_lengths(arrivals: Iterable[Arrival]) -> Lengths:
    """Of a trace."""
    known = list(arrivals)
    return Lengths(
        prompt=round(sum(one.prompt_tokens for one in known) / len(known)),
        thinking=round(sum(one.thinking_tokens for one in known) / len(known)),
        answer=round(sum(one.answer_tokens for one in known) / len(known)),
    )
