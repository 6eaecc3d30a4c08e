"""Which stored tensor goes where: the published names of a checkpoint, and each rank's part of them.

One list serves three users: the reader (this rank's slices), the check of a directory (the whole model is the slice
of tp=1), and the layers (names and shapes of the fused parameters). Integers and names only, no tensors and no files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from workers.config import ModelConfig, ParallelLayout, ShardSpec
from workers.layout import Span


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A part of one stored tensor, and the rows of the fused parameter that it fills."""

    name: str
    shape: tuple[int, ...]
    """Of the whole stored tensor."""
    rows: Span
    cols: Span | None
    """None for a vector."""
    param: str
    param_row: int = 0
    expert: int | None = None
    """Index into a stacked parameter [slots, rows, cols]; None where the parameter is not stacked."""
    num_slots: int = 0
    """Of a stacked parameter; slots beyond its experts stay empty."""
    is_linear: bool = False
    """Linear weights may be stored as FP8 with a scale per tile."""

    @property
    def num_elements(self) -> int:
        return self.rows.size * (1 if self.cols is None else self.cols.size)


def whole_model(config: ModelConfig) -> Iterator[TensorSlice]:
    """Every tensor that a checkpoint of this model must hold, uncut."""
    return rank_slices(config, ShardSpec(ParallelLayout(tp=1), rank=0))


def rank_slices(config: ModelConfig, spec: ShardSpec) -> Iterator[TensorSlice]:
    """What one rank holds, in the order of the layers."""
    vocab, hidden = spec.vocab(config), config.hidden_size
    yield _matrix("model.embed_tokens.weight", (config.vocab_size, hidden), "embed", rows=vocab)
    for layer in range(config.num_layers):
        yield from _attention(config, spec, layer)
        yield from _experts(config, spec, layer) if config.is_moe_layer(layer) else _dense(config, spec, layer)
    yield _vector("model.norm.weight", hidden, "norm")
    if not config.tie_word_embeddings:
        yield _matrix("lm_head.weight", (config.vocab_size, hidden), "lm_head", rows=vocab)


def param_shapes(slices: list[TensorSlice]) -> dict[str, tuple[int, ...]]:
    """Shapes of the fused parameters that these slices fill: [rows], [rows, cols] or [slots, rows, cols]."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in slices:
        rows = part.param_row + part.rows.size
        shape: tuple[int, ...] = (rows,) if part.cols is None else (rows, part.cols.size)
        if part.expert is not None:
            shape = (part.num_slots, *shape)
        known = shapes.get(part.param, shape)
        shapes[part.param] = tuple(max(a, b) for a, b in zip(known, shape, strict=True))
    return shapes


def _attention(config: ModelConfig, spec: ShardSpec, layer: int) -> Iterator[TensorSlice]:
    stored, fused = f"model.layers.{layer}", f"layers.{layer}"
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = spec.heads(config).scaled(head_dim), spec.kv_heads(config).scaled(head_dim)
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    yield _vector(f"{stored}.input_layernorm.weight", hidden, f"{fused}.input_norm")
    at = 0
    for name, num_rows, rows in (("q", q_rows, heads), ("k", kv_rows, kv_heads), ("v", kv_rows, kv_heads)):
        weight = f"{stored}.self_attn.{name}_proj.weight"
        yield _linear(weight, (num_rows, hidden), f"{fused}.qkv", rows=rows, param_row=at)
        at += rows.size
    yield _linear(f"{stored}.self_attn.o_proj.weight", (hidden, q_rows), f"{fused}.o", cols=heads)
    yield _vector(f"{stored}.self_attn.q_norm.weight", head_dim, f"{fused}.q_norm")
    yield _vector(f"{stored}.self_attn.k_norm.weight", head_dim, f"{fused}.k_norm")
    yield _vector(f"{stored}.post_attention_layernorm.weight", hidden, f"{fused}.post_norm")


def _dense(config: ModelConfig, spec: ShardSpec, layer: int) -> Iterator[TensorSlice]:
    columns = _Columns(config.intermediate_size, spec.ffn(config))
    yield from _feed_forward(f"model.layers.{layer}.mlp", f"layers.{layer}", config.hidden_size, columns, _UNSTACKED)


def _experts(config: ModelConfig, spec: ShardSpec, layer: int) -> Iterator[TensorSlice]:
    stored, fused = f"model.layers.{layer}.mlp", f"layers.{layer}"
    yield _matrix(f"{stored}.gate.weight", (config.num_experts, config.hidden_size), f"{fused}.gate")
    columns = _Columns(config.moe_intermediate_size, spec.expert_ffn(config))
    num_slots = spec.expert_slots(config).size
    for index, expert in enumerate(spec.experts(config)):
        place = _Place(index, num_slots)
        yield from _feed_forward(f"{stored}.experts.{expert}", f"{fused}.experts", config.hidden_size, columns, place)


class _Place(NamedTuple):
    """In a stacked parameter."""

    expert: int | None
    num_slots: int


_UNSTACKED = _Place(None, 0)


class _Columns(NamedTuple):
    """Of a feed-forward layer: how many there are, and which are here."""

    total: int
    here: Span


def _feed_forward(stored: str, fused: str, hidden: int, columns: _Columns, place: _Place) -> Iterator[TensorSlice]:
    """Gate above up in one parameter, and down."""
    total, here = columns
    gate_up, down = f"{fused}.gate_up", f"{fused}.down"
    for row, name in ((0, "gate_proj"), (here.size, "up_proj")):
        yield _linear(f"{stored}.{name}.weight", (total, hidden), gate_up, rows=here, param_row=row, place=place)
    yield _linear(f"{stored}.down_proj.weight", (hidden, total), down, cols=here, place=place)


def _vector(name: str, size: int, param: str) -> TensorSlice:
    return TensorSlice(name, (size,), Span(0, size), None, param)


def _matrix(name: str, shape: tuple[int, int], param: str, rows: Span | None = None) -> TensorSlice:
    return TensorSlice(name, shape, rows or Span(0, shape[0]), Span(0, shape[1]), param)


def _linear(
    name: str,
    shape: tuple[int, int],
    param: str,
    *,
    rows: Span | None = None,
    cols: Span | None = None,
    param_row: int = 0,
    place: _Place = _UNSTACKED,
) -> TensorSlice:
    rows, cols = rows or Span(0, shape[0]), cols or Span(0, shape[1])
    return TensorSlice(name, shape, rows, cols, param, param_row, *place, is_linear=True)
