"""Every split dimension is covered exactly, for the real models and any tp that loads."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.config import ModelConfig, ParallelLayout, Quantization, ShardSpec
from workers.errors import LayoutError
from workers.weights import TensorSlice, rank_slices, whole_model

FP8 = Quantization(block_rows=128, block_cols=128)
QWEN3_4B = ModelConfig(
    architecture="qwen3",
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=5e6,
    max_position_embeddings=262144,
    tie_word_embeddings=True,
    eos_token_ids=(151645,),
    quantization=FP8,
)
QWEN3_235B = replace(
    QWEN3_4B,
    architecture="qwen3_moe",
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=94,
    num_heads=64,
    num_kv_heads=4,
    tie_word_embeddings=False,
    num_experts=128,
    num_experts_per_token=8,
    moe_intermediate_size=1536,
    norm_topk_prob=True,
)
MODELS = {"4B": QWEN3_4B, "235B": QWEN3_235B}
VALID = [(name, tp) for name, model in MODELS.items() for tp in range(1, 9) if tp in ParallelLayout.valid_tps(model)]


def one_layer(model: ModelConfig) -> ModelConfig:
    return replace(model, num_layers=1)


def slices_by_name(model: ModelConfig, tp: int) -> dict[str, list[TensorSlice]]:
    found: dict[str, list[TensorSlice]] = {}
    for rank in range(tp):
        for part in rank_slices(model, ShardSpec(ParallelLayout(tp=tp), rank)):
            found.setdefault(part.name, []).append(part)
    return found


def element_counts(parts: list[TensorSlice], whole: TensorSlice) -> Counter[int]:
    """How many parts cover each field of the grid that their edges draw: one key means an even cover."""
    cols = [(0, 1) if part.cols is None else part.cols for part in parts]
    row_cuts = sorted({0, whole.shape[0], *(cut for part in parts for cut in part.rows)})
    col_cuts = sorted({0, *(whole.shape[1:] or (1,)), *(cut for span in cols for cut in span)})
    counts: Counter[int] = Counter()
    for row in row_cuts[:-1]:
        for col in col_cuts[:-1]:
            spans = zip((part.rows for part in parts), cols, strict=True)
            counts[sum(r[0] <= row < r[1] and c[0] <= col < c[1] for r, c in spans)] += 1
    return counts


def expected_owners(name: str, model: ModelConfig, tp: int) -> int:
    """Norms and gates lie on every rank; K and V on several where ranks outnumber KV heads; the rest on one."""
    if "norm" in name or name.endswith("mlp.gate.weight"):
        return tp
    is_kv = "k_proj" in name or "v_proj" in name
    return max(1, tp // model.num_kv_heads) if is_kv else 1


@pytest.mark.parametrize(("name", "tp"), VALID)
def test_ranks_cover_every_element_of_the_real_models_exactly_as_often_as_they_should(name: str, tp: int) -> None:
    model = one_layer(MODELS[name])
    found = slices_by_name(model, tp)
    assert found.keys() == {whole.name for whole in whole_model(model)}
    for whole in whole_model(model):
        owners = expected_owners(whole.name, model, tp)
        assert set(element_counts(found[whole.name], whole)) == {owners}, whole.name


@pytest.mark.parametrize(("name", "tp"), VALID)
def test_scales_stay_with_their_tiles(name: str, tp: int) -> None:
    for parts in slices_by_name(one_layer(MODELS[name]), tp).values():
        for part in parts:
            if part.is_linear and part.cols is not None:
                cuts = (*part.rows, *part.cols)
                assert all(cut % 128 == 0 for cut in cuts), part


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
)
def test_any_layout_either_covers_everything_or_is_refused(
    num_kv_heads: int, group: int, tiles: int, num_experts: int, vocab_size: int, tp: int
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
    if tp not in ParallelLayout.valid_tps(model):
        with pytest.raises(LayoutError, match=f"tp={tp} "):
            ParallelLayout(tp=tp).check(model)
        return
    found = slices_by_name(model, tp)
    for whole in whole_model(model):
        owners = expected_owners(whole.name, model, tp)
        assert set(element_counts(found[whole.name], whole)) == {owners}, whole.name


def test_queries_lie_with_their_kv_head() -> None:
    for tp in (1, 2, 4, 8):
        for rank in range(tp):
            spec = ShardSpec(ParallelLayout(tp=tp), rank)
            heads, kv_heads = spec.heads(QWEN3_235B), spec.kv_heads(QWEN3_235B)
            needed = {head // QWEN3_235B.num_groups for head in range(heads.start, heads.stop)}
            assert needed == set(range(kv_heads.start, kv_heads.stop))


def test_a_layout_that_cannot_load_names_both_numbers_and_what_works() -> None:
    with pytest.raises(LayoutError) as caught:
        ParallelLayout(tp=3).check(QWEN3_4B)
    assert str(caught.value) == (
        "tp=3 cannot split this qwen3 model: 32 attention heads are not divisible by 3; use tp of 1, 2, 4, 8, 16, 32"
    )


def test_more_ranks_than_experts_are_refused() -> None:
    with pytest.raises(LayoutError, match="2 experts are fewer than 4 ranks"):
        ParallelLayout(tp=4).check(replace(QWEN3_235B, num_experts=2))
