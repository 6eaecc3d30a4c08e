"""The bytes of the paged KV cache of one rank. Which sequence owns which block is the Router's business.

G local kv heads, D head_dim, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.config import ModelConfig, ShardSpec
from workers.errors import KVMemoryError


class KVPool:
    """Every layer's K and V, each [num_blocks, block_size, G, D]; finite from the start: padding is read and masked."""

    def __init__(
        self,
        config: ModelConfig,
        spec: ShardSpec,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_blocks, block_size, spec.kv_heads(config).size, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]

    def write(self, layer: int, positions_T: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> None:
        """Store new tokens; `positions_T` are block_id * block_size + offset."""
        self.k[layer].flatten(0, 1).index_copy_(0, positions_T, k_TGD)
        self.v[layer].flatten(0, 1).index_copy_(0, positions_T, v_TGD)


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
