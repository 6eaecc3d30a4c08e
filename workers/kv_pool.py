"""The bytes of the paged KV cache of one rank. Which sequence owns which block is the Router's business.

X the 2G local heads of K, then of V, D head_dim. Layers write to it as they compute.
"""

from __future__ import annotations

import torch

from workers.config import ModelConfig, ShardSpec
from workers.errors import KVMemoryError
from workers.kernels.cpu import large_pages
from workers.kv_memory import kv_token_bytes


class KVPool:
    """Every layer's K and V in one tensor [X, num_blocks, block_size, D].

    Heads come first: gathered blocks of a sequence are then contiguous keys, as attention wants them. Finite from the
    start: where blocks are gathered, padding is read and masked.
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
        is_cpu = device.type == "cpu"
        self.layers = [
            large_pages.zeros(shape, dtype) if is_cpu else torch.zeros(shape, device=device, dtype=dtype)
            for _ in range(config.num_layers)
        ]

    def free(self) -> None:
        """Give the memory back; nothing can be computed any more."""
        is_cuda = any(layer.is_cuda for layer in self.layers)
        self.layers = []
        if is_cuda:
            torch.cuda.empty_cache()  # or the next pool would not find it free


def block_bytes(config: ModelConfig, spec: ShardSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, K and V."""
    return block_size * kv_token_bytes(config, spec, dtype.itemsize)


def num_blocks_in(memory_bytes: int, bytes_per_block: int) -> int:
    """Blocks that fit. Raises KVMemoryError where not one does."""
    num_blocks = memory_bytes // bytes_per_block
    if num_blocks < 1:
        raise KVMemoryError(
            f"{memory_bytes} bytes of KV memory hold no block of {bytes_per_block}; "
            "raise kv_memory_bytes or lower block_size"
        )
    return num_blocks
