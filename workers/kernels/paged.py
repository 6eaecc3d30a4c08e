"""The blocks of a paged KV pool that attention reads, as one tensor.

X the 2G heads of K, then of V, D head_dim, R blocks read.
"""

from __future__ import annotations

from torch import Tensor

Blocks = Tensor | slice
"""Block ids, or a range of them where they follow one another: a lone stream's mostly do."""


def read_blocks(pool: Tensor, blocks: Blocks) -> Tensor:
    """[X, R, block_size, D] of a pool [X, num_blocks, block_size, D]; a range is a view and copies nothing."""
    return pool[:, blocks] if isinstance(blocks, slice) else pool.index_select(1, blocks)
