"""What a step computes, as far as its time depends on it. Plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ENDLESS = 1 << 30
"""Steps."""


class GroupShape(NamedTuple):
    """The part of one attention group."""

    num_decodes: int = 0
    """Sequences that get a token without a prompt's."""
    decode_context: int = 0
    """Tokens of KV that those read, together."""
    prefill_tokens: int = 0
    prefill_pairs: int = 0
    """(token, token it attends to) over all chunks."""
    num_prefills: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.prefill_tokens


StepShape = Sequence[GroupShape]
"""Of every group of a copy."""


def chunk_pairs(start: int, size: int) -> int:
    """Of a chunk at [start, start + size) that attends to all before it, and to itself causally."""
    return size * start + size * (size + 1) // 2
