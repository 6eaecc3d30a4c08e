"""What is measured: loads of each shape, and what their figures are."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from bench.peers.protocol import RunReply
from bench.peers.registry import CONTINUOUS


@dataclass(frozen=True)
class Cell:
    """One load: streams that start together, each with a prompt of its own."""

    streams: int
    prompt: int
    tokens_out: int
    rounds: int
    """At most."""
    bound_s: float
    """Past it an engine is reported as over it, and not asked for the cell again."""
    budget_s: float | None = None
    """Of all engines that are loaded together: no further round begins after it."""
    without: frozenset[str] = frozenset()
    """Engines that are not asked: in a run that is to be short, those that were far behind at smaller loads."""

    @classmethod
    def parse(cls, text: str) -> Cell:
        """As `8x32+16`: streams, prompt, tokens out."""
        streams, rest = text.split("x")
        prompt, tokens_out = rest.split("+")
        return cls(int(streams), int(prompt), int(tokens_out), rounds=3, bound_s=120)

    def with_rounds(self, rounds: int) -> Cell:
        return replace(self, rounds=rounds)

    def __str__(self) -> str:
        return f"{self.streams} × {self.prompt} + {self.tokens_out}"

    @property
    def length(self) -> int:
        return self.prompt + self.tokens_out

    @property
    def warm_up(self) -> Cell:
        """The same with hardly any output; many streams have short prompts, as they are many rows anyway."""
        prompt = self.prompt if self.streams == 1 else min(self.prompt, 8)
        return replace(self, prompt=prompt, tokens_out=min(self.tokens_out, 4))

    @property
    def decodes(self) -> bool:
        """Whether its figures are of generating; else it is there for the first token."""
        return self.tokens_out > 2

    def prompts(self, ids: range, round_number: int) -> list[list[int]]:
        """Random, the same for all engines, others in each round: no engine has seen them before."""
        draw = random.Random(f"{self} {round_number}")
        return [draw.choices(ids, k=self.prompt) for _ in range(self.streams)]


@dataclass(frozen=True)
class Figures:
    """Of one run."""

    tokens_per_s: float
    """All output tokens over the time of all, prompts included."""
    ttft_s: float
    """Median over streams."""
    tpot_s: float | None
    """Median over streams of (last token − first token) / (tokens − 1)."""

    @classmethod
    def of(cls, reply: RunReply) -> Figures:
        times_s = reply.times_s
        return cls(
            tokens_per_s=sum(map(len, times_s)) / max(stream[-1] for stream in times_s),
            ttft_s=statistics.median(stream[0] for stream in times_s),
            tpot_s=_tpot_s(times_s),
        )


def _tpot_s(times_s: Sequence[Sequence[float]]) -> float | None:
    means_s = [(stream[-1] - stream[0]) / (len(stream) - 1) for stream in times_s if len(stream) > 1]
    return statistics.median(means_s) if means_s else None


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of tokens that are ours, up to the first of each stream that is not; after it the texts differ anyway."""
    same = compared = 0
    for our_stream, their_stream in zip(ours, theirs, strict=True):
        for our_token, their_token in zip(our_stream, their_stream, strict=True):
            compared += 1
            if our_token != their_token:
                break
            same += 1
    return same / compared


BIG_QUICK = [
    Cell(1, 32, 32, rounds=3, bound_s=60, budget_s=20),
    Cell(8, 32, 16, rounds=3, bound_s=60, budget_s=20),
    Cell(32, 32, 16, rounds=3, bound_s=90, budget_s=20, without=frozenset({CONTINUOUS})),
    Cell(1, 1024, 2, rounds=3, bound_s=60, budget_s=20),
]
"""Minutes on two cores: without 16 streams, which lie between."""
QUICK = {
    "pocket": [
        Cell(1, 32, 64, rounds=4, bound_s=30),
        *[Cell(streams, 32, 64, rounds=4, bound_s=30) for streams in (4, 8, 16, 32)],
        Cell(1, 1024, 2, rounds=4, bound_s=30),
    ],
    "dense-0.6b": BIG_QUICK,
    "moe-1.5b": BIG_QUICK,
}
ONE_STREAM = [Cell(1, 32, 16, rounds=3, bound_s=120)]
"""Of shapes that hardly fit."""


def full_grid() -> Iterator[Cell]:
    """Loads 1 to 32, prompts 32 to 4096, 128 tokens out; and the cell of the time to a first token."""
    for prompt, streams in product((32, 512, 4096), (1, 4, 8, 16, 32)):
        yield Cell(streams, prompt, 128, rounds=3, bound_s=600)
    yield Cell(1, 1024, 2, rounds=3, bound_s=120)


def grid(shape: str, *, full: bool) -> list[Cell]:
    if shape == "dense-4b":
        return ONE_STREAM
    return list(full_grid()) if full else QUICK.get(shape, BIG_QUICK)
