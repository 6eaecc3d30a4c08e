"""Memory of a GPU that steps take beside weights and KV: integers only, and more rather than less.

KV is sized before a step was run, since recordings know where it lies: what they and the largest steps will hold is
computed from their shapes. A rank that has given all to KV would fail in its first long prompt, or while it serves.
"""

from __future__ import annotations

from workers.buckets import Buckets
from workers.config import ModelConfig, RunnerConfig

ITEM_BYTES = 2
"""bf16."""
SUM_BYTES = 4
"""fp32: partial sums and logits."""
RESIDUAL_ROWS = 6
"""Live rows as wide as the residual: itself, what is added, its norm, what is quantised and what is sent."""
LOAD_SKEW = 2
"""The fullest rank's share of the pairs of tokens and experts, by an even one."""
SORT_BYTES = 24
"""Of a logit whose row is sorted: value and number, twice."""
PENALTY_BYTES = 5
"""Of a slot and a token: a count, and whether it is in the prompt."""
SPLIT_KEYS = 256
"""That decode attention sums by themselves."""
NODE_BYTES = 8 * 2**10
"""Of a recorded launch; with what the driver keeps beside it."""
LAUNCHES_PER_LAYER = 20
LIBRARY_BYTES = 512 * 2**20
"""What cuBLAS, the allocator's rounding, and NCCL of each group take."""


def step_bytes(model: ModelConfig, config: RunnerConfig, buckets: Buckets | None) -> int:
    """All of it. `buckets`: of the steps that are recorded."""
    recorded = 0 if buckets is None else _recorded_bytes(model, config, buckets)
    num_groups = 1 + (config.layout.world_size > 1) + (config.layout.dp > 1 and config.layout.tp > 1)
    return _prompt_bytes(model, config) + _draw_bytes(model, config) + recorded + num_groups * LIBRARY_BYTES


def _prompt_bytes(model: ModelConfig, config: RunnerConfig) -> int:
    """Of the longest chunks: live rows and the inside of the widest layer."""
    rows, spec, hidden = config.max_num_batched_tokens, config.spec, model.hidden_size
    heads = (2 * spec.heads(model).size + 2 * spec.kv_heads(model).size) * model.head_dim
    widest = heads
    if model.has_dense_layers:
        widest = max(widest, 3 * spec.ffn(model).size)
    num_bytes = ITEM_BYTES * rows * (RESIDUAL_ROWS * hidden + widest)
    if model.has_moe_layers:
        layout = config.layout
        pairs = LOAD_SKEW * rows * layout.dp * model.num_experts_per_token // layout.ep
        arrived = rows * layout.dp if layout.dp > 1 else 0
        num_bytes += ITEM_BYTES * (pairs * (3 * spec.expert_ffn(model).size + 2 * hidden) + 3 * arrived * hidden)
    return num_bytes


def _draw_bytes(model: ModelConfig, config: RunnerConfig) -> int:
    """Of as many rows as there are slots: logits of this rank, all of them where nobody cuts, and counts."""
    local = config.spec.vocab(model).size
    per_slot = local * (ITEM_BYTES + 2 * SUM_BYTES + PENALTY_BYTES) + model.vocab_size * SORT_BYTES
    return config.max_num_seqs * per_slot


def _recorded_bytes(model: ModelConfig, config: RunnerConfig, buckets: Buckets) -> int:
    """Launches, and what the largest size holds: twice, as it is run before it is recorded."""
    sizes, heads = list(buckets), config.spec.heads(model).size
    splits = max(size.num_rows * -(-size.longest // SPLIT_KEYS) for size in sizes)
    sums = splits * heads * (model.head_dim + 2) * SUM_BYTES
    rows = max(size.num_rows for size in sizes)
    logits = rows * config.spec.vocab(model).size * (ITEM_BYTES + SUM_BYTES)
    arrived = rows * config.layout.world_size * model.hidden_size * 3 * ITEM_BYTES if config.layout.dp > 1 else 0
    nodes = len(sizes) * model.num_layers * LAUNCHES_PER_LAYER * NODE_BYTES
    return nodes + 2 * (sums + logits) + len(buckets.row_sizes) * arrived
