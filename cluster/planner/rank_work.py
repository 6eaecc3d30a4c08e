"""What the fullest rank of a layout holds and does: weights, heads, experts, and bytes and operations of a token.

Counted from `workers.weights`, the list that the checkpoint reader follows. The fullest rank, because a step lasts as
long as its slowest one. Weights count as they are stored: FP8 with its scales, the rest bf16.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from workers.config import ModelConfig
from workers.kv_memory import kv_token_bytes
from workers.layout import ParallelLayout, ShardSpec
from workers.weights import TensorSlice, rank_slices

_SCALE_BYTES = 2
_STORED_BYTES = 2
_MAX_RANKS_LOOKED_AT = 64
"""Ranks repeat themselves: the uneven ones among the first so many stand for all."""


@dataclass(frozen=True, kw_only=True)
class RankWork:
    """Of the fullest rank. Parameters are counted for one token; bytes are what lies in memory."""

    weight_bytes: int
    kv_token_bytes: int
    """Of a token of a sequence of its group."""
    dense_bytes: int
    """Read in every step: attention, dense layers, gates, norms, head."""
    dense_params: int
    """A token is multiplied with, head left out."""
    head_params: int
    expert_bytes: float
    """One expert in one layer, as far as it lies here."""
    expert_params: float
    num_local_experts: int
    """Different ones in a layer."""
    num_moe_layers: int
    num_heads: int
    """Query heads here."""


def rank_work(model: ModelConfig, layout: ParallelLayout, *, redundant_experts: int, kv_itemsize: int) -> RankWork:
    """The layout must suit the model."""
    specs = [ShardSpec(layout, rank, redundant_experts) for rank in range(layout.world_size)][:_MAX_RANKS_LOOKED_AT]
    moe_layers = sum(model.is_moe_layer(layer) for layer in range(model.num_layers))
    outside = _parts(replace(model, num_layers=0), specs)
    dense = _parts(replace(model, num_layers=1, num_experts=0), specs)
    moe = _parts(replace(model, num_layers=1, mlp_only_layers=frozenset(), decoder_sparse_step=1), specs)
    layers = [(moe_layers, moe), (model.num_layers - moe_layers, dense)]
    head = max(spec.vocab(model).size for spec in specs) * model.hidden_size
    expert_params = 3 * model.hidden_size * max(spec.expert_ffn(model).size for spec in specs) if moe_layers else 0
    expert_bytes = expert_params * _linear_bytes(model)
    num_local = max(len(spec.experts(model)) for spec in specs) if moe_layers else 0
    # All that is outside an expert: a layer's whole, less its experts.
    attention = sum(count * (kind - outside) for count, kind in layers) - moe_layers * num_local * expert_bytes
    embedding = head * _STORED_BYTES  # only rows are looked up, unless it is the head, too
    gate_params = model.num_experts * model.hidden_size * moe_layers
    return RankWork(
        weight_bytes=int(outside + sum(count * (kind - outside) for count, kind in layers)),
        kv_token_bytes=max(kv_token_bytes(model, spec, kv_itemsize) for spec in specs),
        dense_bytes=int(outside + attention - (0 if model.tie_word_embeddings else embedding)),
        dense_params=int((attention - gate_params * _STORED_BYTES) / _linear_bytes(model)) + gate_params,
        head_params=head,
        expert_bytes=expert_bytes,
        expert_params=expert_params,
        num_local_experts=num_local,
        num_moe_layers=moe_layers,
        num_heads=specs[0].heads(model).size,
    )


def _parts(model: ModelConfig, specs: Iterable[ShardSpec]) -> float:
    """Bytes of the fullest rank."""
    return max(sum(_slice_bytes(model, part) for part in rank_slices(model, spec)) for spec in specs)


def _slice_bytes(model: ModelConfig, part: TensorSlice) -> float:
    return part.num_elements * (_linear_bytes(model) if part.is_linear else _STORED_BYTES)


def _linear_bytes(model: ModelConfig) -> float:
    """Of one weight of a linear layer, with its share of the tile's scale."""
    quantization = model.quantization
    if quantization is None:
        return _STORED_BYTES
    return 1 + _SCALE_BYTES / (quantization.block_rows * quantization.block_cols)
