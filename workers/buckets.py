"""The sizes in which decode steps are recorded: a step is padded to the next one. Integers only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from workers.config import ModelConfig
from workers.layout import ParallelLayout

MAX_GATHERED_ROWS = 64
"""Rows of the fullest rank up to which all are gathered: a decode's size. More are sent to their experts with uneven
counts, at which the host has to look.

Over gloo on one machine gathering is faster up to 32 rows where groups are even, and sending from 64 where they are
not (bench/dispatch.py).
"""
SHORTEST_BOUND = 4096
LENGTH_FACTOR = 4
"""From one bound of the context to the next: programs behind a sequence's end return at once, but must be started."""
SIZES_PER_DOUBLING = 2
"""From 16 rows on: at most half as many rows again are computed for nothing."""


@dataclass(frozen=True, order=True)
class Bucket:
    """What a recorded step has room for."""

    num_rows: int
    longest: int
    """Keys of the longest sequence."""

    @property
    def is_affordable(self) -> bool:
        """Whether its partial sums are of a size to keep."""
        return self.num_rows * self.longest <= MAX_KEYS


MAX_KEYS = 2**24
"""Rows times bound: attention keeps partial sums for all of them, some 64 bytes for each."""


class Buckets:
    """All sizes of a rank."""

    def __init__(self, max_rows: int, max_len: int) -> None:
        self.row_sizes = _row_sizes(max_rows)
        self.lengths = _lengths(max_len)

    def __iter__(self) -> Iterator[Bucket]:
        """The largest first: what is recorded later then fits into memory that they have."""
        sizes = (Bucket(rows, length) for length in reversed(self.lengths) for rows in reversed(self.row_sizes))
        return (bucket for bucket in sizes if bucket.is_affordable)

    def bucket_for(self, num_rows: int, longest: int) -> Bucket | None:
        """The smallest for so many rows, of which the longest sees so many keys; None where there is none."""
        rows, length = self.rows_for(num_rows), _at_least(self.lengths, longest)
        if rows is None or length is None:
            return None
        bucket = Bucket(rows, length)
        return bucket if bucket.is_affordable else None

    def can_be_padded(self, num_rows: int) -> bool:
        """Whether a size is also taken for fewer rows."""
        index = self.row_sizes.index(num_rows)
        return num_rows > 1 + (self.row_sizes[index - 1] if index else 0)

    def rows_for(self, num_rows: int) -> int | None:
        """The smallest size for so many rows; None where there is none."""
        return _at_least(self.row_sizes, num_rows)


def decode_sizes(model: ModelConfig, layout: ParallelLayout, max_num_seqs: int, max_len: int) -> Buckets:
    """Of the decode steps of a rank that can be recorded."""
    is_even = layout.dp == 1 or not model.has_moe_layers
    return Buckets(max_num_seqs if is_even else min(max_num_seqs, MAX_GATHERED_ROWS * layout.tp), max_len)


def _at_least(sizes: list[int], wanted: int) -> int | None:
    index = bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else None


def _row_sizes(max_rows: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ..., and the largest."""
    sizes = [1]
    while sizes[-1] < max_rows:
        last = sizes[-1]
        power = 1 << (last.bit_length() - 1)
        sizes.append(2 * last if last < 16 else last + power // SIZES_PER_DOUBLING)
    return [*sizes[:-1], max_rows]


def _lengths(max_len: int) -> list[int]:
    lengths = [SHORTEST_BOUND]
    while lengths[-1] < max_len:
        lengths.append(lengths[-1] * LENGTH_FACTOR)
    return [*lengths[:-1], max_len]
