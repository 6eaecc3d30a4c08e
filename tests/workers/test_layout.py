"""Every split dimension is covered exactly, for the real models and any tp that loads."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.real_models import QWEN3_4B, QWEN3_235B
from workers.config import ModelConfig, ParallelLayout, ShardSpec
from workers.errors import LayoutError
from workers.layout import Span
from workers.weights import TensorSlice, rank_slices, whole_model

MODELS = {"4B": QWEN3_4B, "235B": QWEN3_235B}
MAX_RANKS = 32


def layouts_up_to(num_ranks: int) -> list[ParallelLayout]:
    shapes = [(tp, dp) for tp in range(1, num_ranks + 1) for dp in range(1, num_ranks // tp + 1)]
    return [ParallelLayout(tp=tp, dp=dp, expert_tp=size) for tp, dp in shapes for size in range(1, tp * dp + 1)]


def one_layer(model: ModelConfig) -> ModelConfig:
    return replace(model, num_layers=1)


def slices_by_name(model: ModelConfig, layout: ParallelLayout, redundant: int = 0) -> dict[str, list[TensorSlice]]:
    found: dict[str, list[TensorSlice]] = {}
    for rank in range(layout.world_size):
        for part in rank_slices(model, ShardSpec(layout, rank, redundant)):
            found.setdefault(part.name, []).append(part)
    return found


def element_counts(parts: list[TensorSlice], whole: TensorSlice) -> Counter[int]:
    """How many parts cover each field of the grid that their edges draw: one key means an even cover."""
    return field_counts(tuple((part.rows, part.cols or Span(0, 1)) for part in parts), whole.shape)


@cache
def field_counts(spans: tuple[tuple[Span, Span], ...], shape: tuple[int, ...]) -> Counter[int]:
    """Most of a layer's experts are cut as their neighbours are: each way is counted once."""
    row_cuts = sorted({0, shape[0], *(cut for rows, _ in spans for cut in rows)})
    col_cuts = sorted({0, *(shape[1:] or (1,)), *(cut for _, cols in spans for cut in cols)})
    counts: Counter[int] = Counter()
    for row in row_cuts[:-1]:
        for col in col_cuts[:-1]:
            counts[sum(r[0] <= row < r[1] and c[0] <= col < c[1] for r, c in spans)] += 1
    return counts


def expected_owners(name: str, model: ModelConfig, layout: ParallelLayout) -> int:
    """How many ranks hold each element.

    Norms and gates lie on every rank; experts on one; all else once in each group, but for K and V where a group's
    ranks outnumber the KV heads.
    """
    if "norm" in name or name.endswith("mlp.gate.weight"):
        return layout.tp * layout.dp
    if ".experts." in name:
        return 1
    is_kv = "k_proj" in name or "v_proj" in name
    return layout.dp * (max(1, layout.tp // model.num_kv_heads) if is_kv else 1)


def check_cover(model: ModelConfig, wholes: list[TensorSlice], layout: ParallelLayout) -> None:
    found = slices_by_name(model, layout)
    assert found.keys() == {whole.name for whole in wholes}
    for whole in wholes:
        owners = expected_owners(whole.name, model, layout)
        assert set(element_counts(found[whole.name], whole)) == {owners}, f"{layout}: {whole.name}"


def can_be(model: ModelConfig, layout: ParallelLayout) -> bool:
    """Whether a real model can be split so, by the rule of each dimension."""
    tp, ranks, size = layout.tp, layout.tp * layout.dp, layout.expert_tp
    kv_divide = model.num_kv_heads % tp == 0 or tp % model.num_kv_heads == 0
    if model.num_heads % tp or not kv_divide or ranks % size:
        return False
    if not model.num_experts:
        return size == 1 and -(-model.intermediate_size // 128) >= tp
    return model.num_experts >= ranks // size and model.moe_intermediate_size // 128 >= size


@pytest.mark.parametrize("name", MODELS)
def test_ranks_cover_every_element_of_the_real_models_exactly_as_often_as_they_should(name: str) -> None:
    model = one_layer(MODELS[name])
    wholes = list(whole_model(model))
    for layout in layouts_up_to(MAX_RANKS):
        if can_be(model, layout):
            layout.check(model)
            check_cover(model, wholes, layout)


@pytest.mark.parametrize("name", MODELS)
def test_every_other_layout_of_the_real_models_is_refused_with_ones_that_work(name: str) -> None:
    model = MODELS[name]
    refused = [layout for layout in layouts_up_to(MAX_RANKS) if not can_be(model, layout)]
    for layout in refused:
        assert not layout.works_for(model), layout
    for layout in refused[:: len(refused) // 20]:
        assert all(can_be(model, near) for near in layout.nearest(model))
        with pytest.raises(LayoutError, match=f"^{layout} cannot split .* the nearest that work: tp="):
            layout.check(model)


@pytest.mark.parametrize("name", MODELS)
def test_scales_stay_with_their_tiles(name: str) -> None:
    model = one_layer(MODELS[name])
    for layout in layouts_up_to(MAX_RANKS):
        if can_be(model, layout):
            parts = [part for parts in slices_by_name(model, layout).values() for part in parts if part.is_linear]
            cuts = {cut for part in parts if part.cols is not None for cut in (*part.rows, *part.cols)}
            assert not any(cut % 128 for cut in cuts), layout


@pytest.mark.parametrize("redundant", [1, 16, 130])
def test_every_expert_is_loaded_and_redundant_ones_again(redundant: int) -> None:
    model = one_layer(QWEN3_235B)
    found = slices_by_name(model, ParallelLayout(tp=2, dp=4), redundant)
    for expert in range(128):
        copies = 1 + redundant // 128 + (expert < redundant % 128)
        assert len(found[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"]) == copies


def test_the_4b_model_splits_its_76_tiles_unevenly_over_8_ranks() -> None:
    sizes = [ShardSpec(ParallelLayout(tp=8), rank).ffn(QWEN3_4B).size // 128 for rank in range(8)]
    assert sum(sizes) == 76
    assert set(sizes) == {9, 10}


@given(
    num_kv_heads=st.integers(1, 8),
    group=st.integers(1, 8),
    tiles=st.integers(1, 40),
    num_experts=st.integers(1, 40),
    vocab_size=st.integers(8, 2000),
    tp=st.integers(1, 16),
    dp=st.integers(1, 4),
    expert_tp=st.integers(1, 4),
)
def test_any_layout_either_covers_everything_or_is_refused(
    num_kv_heads: int, group: int, tiles: int, num_experts: int, vocab_size: int, tp: int, dp: int, expert_tp: int
) -> None:
    model = replace(
        QWEN3_235B,
        num_layers=2,
        mlp_only_layers=frozenset({0}),
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        intermediate_size=tiles * 128,
        num_experts=num_experts,
        vocab_size=vocab_size,
    )
    layout = ParallelLayout(tp=tp, dp=dp, expert_tp=expert_tp)
    if not layout.works_for(model):
        with pytest.raises(LayoutError, match=f"^{layout} cannot split"):
            layout.check(model)
        return
    check_cover(model, list(whole_model(model)), layout)


def test_queries_lie_with_their_kv_head() -> None:
    for tp in (1, 2, 4, 8):
        for rank in range(tp):
            spec = ShardSpec(ParallelLayout(tp=tp), rank)
            heads, kv_heads = spec.heads(QWEN3_235B), spec.kv_heads(QWEN3_235B)
            needed = {head // QWEN3_235B.num_groups for head in range(heads.start, heads.stop)}
            assert needed == set(range(kv_heads.start, kv_heads.stop))


REFUSALS = [
    (
        QWEN3_4B,
        ParallelLayout(tp=3),
        "tp=3 cannot split this qwen3 model: 32 attention heads are not divisible by 3; "
        "the nearest that work: tp=1·dp=3, tp=2, tp=4, tp=1·dp=2",
    ),
    (
        QWEN3_4B,
        ParallelLayout(tp=0),
        "tp=0 cannot split this qwen3 model: tp must be at least 1; "
        "the nearest that work: tp=1, tp=2, tp=1·dp=2, tp=1·dp=3",
    ),
    (
        QWEN3_4B,
        ParallelLayout(tp=2, expert_tp=2),
        "tp=2·expert_tp=2 cannot split this qwen3 model: it has no experts "
        "for expert_tp to split; the nearest that work: tp=2, tp=1·dp=2, tp=1, tp=1·dp=3",
    ),
    (
        QWEN3_235B,
        ParallelLayout(tp=4, dp=2, expert_tp=3),
        "tp=4·dp=2·expert_tp=3 cannot split this qwen3_moe model: 8 ranks are not divisible by expert_tp 3; "
        "the nearest that work: tp=4·dp=2·expert_tp=2, tp=4·dp=2·expert_tp=4, tp=4·dp=2, tp=4·dp=2·expert_tp=8",
    ),
    (
        replace(QWEN3_235B, num_experts=2),
        ParallelLayout(tp=4),
        "tp=4 cannot split this qwen3_moe model: 2 experts are "
        "fewer than 4 ranks; the nearest that work: tp=4·expert_tp=2, tp=4·expert_tp=4, tp=2·dp=2·expert_tp=2, "
        "tp=2·dp=2·expert_tp=4",
    ),
    (
        QWEN3_235B,
        ParallelLayout(tp=16, expert_tp=16),
        "tp=16·expert_tp=16 cannot split this qwen3_moe model: an "
        "expert's 12 tiles of 128 are fewer than expert_tp 16; the nearest that work: tp=16·expert_tp=8, "
        "tp=16·expert_tp=4, tp=16·expert_tp=2, tp=16",
    ),
]


@pytest.mark.parametrize(("model", "layout", "message"), REFUSALS, ids=[str(layout) for _, layout, _ in REFUSALS])
def test_a_layout_that_cannot_load_names_the_numbers_and_what_works(
    model: ModelConfig, layout: ParallelLayout, message: str
) -> None:
    with pytest.raises(LayoutError) as caught:
        layout.check(model)
    assert str(caught.value) == message
