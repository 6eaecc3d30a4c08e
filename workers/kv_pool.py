"""The bytes of the paged KV cache of one rank. Which sequence owns which block is the Router's business.

G local kv heads, D head_dim, T tokens, X the 2G heads of K, then of V.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.config import ModelConfig, ShardSpec
from workers.errors import KVMemoryError


class KVPool:
    """Every layer's K and V in one tensor [X, num_blocks, block_size, D].

    Heads come first: gathered blocks of a sequence are then contiguous keys, as attention wants them. Finite from the
    start: padding is read and masked.
    """

    def __init__(
        self,
        config: ModelConfig,
        spec: ShardSpec,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (2 * spec.kv_heads(config).size, num_blocks, block_size, config.head_dim)
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]

    def write(self, layer: int, cells_T: Tensor, kv_TXD: Tensor) -> None:
        """Store new tokens; `cells_T` are block_id * block_size + offset."""
        self.layers[layer].flatten(1, 2).index_copy_(1, cells_T, kv_TXD.transpose(0, 1))


def block_bytes(config: ModelConfig, spec: ShardSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, K and V."""
    per_token = 2 * config.num_layers * spec.kv_heads(config).size * config.head_dim
    return block_size * per_token * dtype.itemsize


def num_blocks_in(memory_bytes: int, bytes_per_block: int) -> int:
    """Blocks that fit. Raises KVMemoryError where not one does."""
    num_blocks = memory_bytes // bytes_per_block
    if num_blocks < 1:
        raise KVMemoryError(
            f"{memory_bytes} bytes of KV memory hold no block of {bytes_per_block}; "
            "raise kv_memory_bytes or lower block_size"
        )
    return num_blocks
