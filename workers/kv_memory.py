"""How much memory KV takes: integers only, so that capacity can be planned where there is no torch."""

from __future__ import annotations

from workers.config import ModelConfig, ShardSpec

CPU_KV_BYTES = 256 * 2**20
MEMORY_SHARE = 0.88
"""Of the free memory after loading, at most; the rest is for what steps hold and for the allocator."""


def default_kv_bytes(free_bytes: int, device: str, step_bytes: int = 0) -> int:
    """A rank's KV pool where none is asked for, from what is free once its weights are loaded.

    `step_bytes`: what steps hold at the same time.
    """
    share = min(int(free_bytes * MEMORY_SHARE), max(0, free_bytes - step_bytes))
    return min(CPU_KV_BYTES, share) if device == "cpu" else share


def kv_token_bytes(config: ModelConfig, spec: ShardSpec, itemsize: int) -> int:
    """Of one token on a rank: K and V, over all layers."""
    return 2 * config.num_layers * spec.kv_heads(config).size * config.head_dim * itemsize
