"""Logprobs as a table of numbers, so that a step's travel to the host together, and nobody waits for them meanwhile.

A part of hop 9. fp64 holds every token id and every fp32 exactly. R rows of a table, C candidates of each, X = 1 + 2C.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from workers.step import TokenLogprobs
from workers.transfers import Arrival, Fetch


class Asked(NamedTuple):
    """What is asked of a row."""

    row: int
    owner: int
    """Who asks; the meaning is the caller's."""
    num_top: int
    """How many of the likeliest."""


@dataclass(frozen=True)
class LogprobTable:
    """Still on the device."""

    values_RX: Tensor
    """Of each row the logprob of one token; those of the likeliest; their ids."""
    asked: list[Asked]

    @classmethod
    def of(cls, named_R: Tensor, top_RC: Tensor, ids_RC: Tensor, asked: list[Asked]) -> LogprobTable:
        """`top_RC`: logprobs of the tokens `ids_RC`, likeliest first."""
        columns = [named_R.unsqueeze(1), top_RC, ids_RC]
        return cls(torch.cat([column.double() for column in columns], dim=1), asked)

    def send(self, fetch: Fetch) -> ComingLogprobs:
        return ComingLogprobs(fetch(self.values_RX), self.asked)


@dataclass(frozen=True)
class ComingLogprobs:
    """On their way to the host."""

    arrival: Arrival
    asked: list[Asked]

    def each(self) -> Iterator[tuple[int, TokenLogprobs]]:
        """(owner, logprobs), as they were asked for; waits until they are here."""
        rows = self.arrival.values()
        for row, owner, num_top in self.asked:
            yield owner, _read(rows[row], num_top)


def _read(row: list[float], num_top: int) -> TokenLogprobs:
    named, *others = row
    top, ids = others[: len(others) // 2], others[len(others) // 2 :]
    pairs = zip(ids[:num_top], top[:num_top], strict=True)
    # What a rule masks is no candidate, however many are asked for.
    return TokenLogprobs(named, [(int(token_id), value) for token_id, value in pairs if value > -math.inf])
