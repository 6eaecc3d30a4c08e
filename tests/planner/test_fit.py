"""What fits, against figures that were computed by hand and against what a rank really loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.planner.devices import find_device, known_devices, published_kernels, sources
from cluster.planner.layouts import BLOCK_SIZE, Candidate, Limits, candidates, fit
from cluster.planner.models import find_model
from cluster.planner.rank_work import rank_work
from cluster.planner.roofline import FLOOR, Roofline
from cluster.planner.setting import Setting
from cluster.planner.survey import Row, decode_shape, survey, without_lesser
from tests.real_models import QWEN3_4B, QWEN3_235B
from workers.buckets import decode_sizes
from workers.checkpoint import Checkpoint
from workers.config import RunnerConfig
from workers.errors import MullError
from workers.kv_memory import MEMORY_SHARE
from workers.layout import ParallelLayout, ShardSpec
from workers.step_memory import step_bytes

POCKET = Path(__file__).parents[2] / "deploy" / "models" / "pocket"
H200 = find_device("h200")
LIMITS = Limits(max_num_seqs=256, max_num_batched_tokens=4096, context=262144)


@pytest.mark.parametrize(("name", "config"), [("qwen3-235b", QWEN3_235B), ("qwen3-4b", QWEN3_4B)])
def test_known_models_have_the_published_dimensions(name: str, config: object) -> None:
    assert replace(find_model(name).config, eos_token_ids=(151645,)) == config


@pytest.mark.parametrize(
    ("tp", "dp", "weights_gb", "kv_token_bytes"),
    [(4, 1, 59.2, 48_128), (8, 1, 29.7, 48_128), (4, 2, 30.8, 48_128), (1, 8, 37.7, 192_512)],
)
def test_the_235b_takes_the_bytes_that_its_dimensions_say(
    tp: int, dp: int, weights_gb: float, kv_token_bytes: int
) -> None:
    work = rank_work(QWEN3_235B, ParallelLayout(tp=tp, dp=dp), redundant_experts=0, kv_itemsize=2)

    assert round(work.weight_bytes / 1e9, 1) == weights_gb
    assert work.kv_token_bytes == kv_token_bytes


@pytest.mark.parametrize(
    "layout", [ParallelLayout(), ParallelLayout(tp=2), ParallelLayout(dp=2), ParallelLayout(tp=2, dp=2)]
)
def test_weights_are_what_a_rank_reads_of_a_checkpoint(layout: ParallelLayout) -> None:
    checkpoint = Checkpoint.open(POCKET)
    read = max(checkpoint.slice_bytes(ShardSpec(layout, rank)) for rank in range(layout.world_size))

    work = rank_work(checkpoint.config, layout, redundant_experts=0, kv_itemsize=4)

    assert work.weight_bytes == pytest.approx(read, rel=0.01)  # scales may be stored as four bytes instead of two


def test_dense_and_expert_parameters_are_all_of_the_model() -> None:
    work = rank_work(QWEN3_235B, ParallelLayout(), redundant_experts=0, kv_itemsize=2)

    experts = work.num_moe_layers * work.num_local_experts * work.expert_params
    embedding = work.head_params
    assert work.dense_params + experts + work.head_params + embedding == pytest.approx(235.1e9, rel=0.001)


def test_what_cannot_be_split_or_held_says_why() -> None:
    problems = {
        str(one): fit(QWEN3_235B, one, find_device("h100"), LIMITS).problem
        for one in (
            Candidate(layout=ParallelLayout(tp=3), copies=1),
            Candidate(layout=ParallelLayout(tp=2), copies=2),
            Candidate(layout=ParallelLayout(tp=2, dp=2), copies=1),
        )
    }

    assert problems["tp=3"] == "64 attention heads are not divisible by 3"
    assert problems["2 × tp=2"] == "weights are 118.3 GB a rank, a device has 84.9"
    assert (problems["tp=2·dp=2"] or "").startswith("KV has room for")


def test_every_way_to_use_the_ranks_is_looked_at() -> None:
    dense, experts = candidates(QWEN3_4B, 4), candidates(QWEN3_235B, 4)

    assert {str(one) for one in dense} == {"tp=4", "2 × tp=2", "4 × tp=1"}
    assert {one.copies * one.layout.world_size for one in experts} == {4}
    assert len(set(experts)) == len(experts)


@pytest.mark.parametrize(("streams", "floor_ms"), [(1, 1.17), (8, 2.15), (32, 5.5), (64, 10.0)])
def test_the_floor_of_a_step_is_bytes_over_bandwidth(streams: int, floor_ms: float) -> None:
    one = Candidate(layout=ParallelLayout(), copies=1)
    work = rank_work(QWEN3_4B, one.layout, redundant_experts=0, kv_itemsize=2)

    step_s = Roofline(QWEN3_4B, one.layout, work, H200, FLOOR).step(decode_shape(one, streams, 4096)).total_s

    assert step_s * 1e3 == pytest.approx(floor_ms, rel=0.01)


def test_estimates_are_above_their_floors_and_longer_with_more_streams() -> None:
    for row in survey(Setting(model=QWEN3_235B, device=H200, kernels=published_kernels()), 8, LIMITS):
        for step in row.steps:
            assert step.estimate.total_s > (step.floor_s or 0) > 0
        times = [step.estimate.total_s for step in row.steps]
        assert times == sorted(times)


def test_every_constant_has_a_source() -> None:
    for name in [*known_devices(), "kernels"]:
        assert all(sources(name).values())
    for name in known_devices():
        named = set(sources(name))
        assert named == {field for field in vars(find_device(name)) if field not in ("name", "title", "ranks_per_node")}
    assert set(sources("kernels")) == set(vars(published_kernels()))


def test_an_unknown_model_or_device_names_those_that_there_are() -> None:
    with pytest.raises(MullError, match="qwen3-235b, qwen3-4b"):
        find_model("qwen9")
    with pytest.raises(MullError, match="h100, h20, h200"):
        find_device("abacus")


def test_layouts_that_split_experts_are_shown_where_they_are_clearly_faster() -> None:
    setting = Setting(model=QWEN3_235B, device=H200, kernels=published_kernels())
    everything = survey(setting, 8, LIMITS)

    shown = without_lesser(everything)

    assert 0 < len(shown) < len(everything) / 2
    assert sum(row.fit.candidate.layout.expert_tp == 1 for row in shown) == len({*map(place_of, everything)})
    for row in shown:
        if row.fit.candidate.layout.expert_tp > 1:
            whole = next(other for other in shown if place_of(other) == place_of(row))
            assert row.steps[-1].estimate.total_s < whole.steps[-1].estimate.total_s


def place_of(row: Row) -> tuple[int, int, int]:
    candidate = row.fit.candidate
    return candidate.copies, candidate.layout.tp, candidate.layout.dp


def test_kv_is_what_a_rank_takes_for_it_beside_its_steps() -> None:
    device, layout = find_device("h100"), ParallelLayout(tp=4)
    config = RunnerConfig(
        model_dir="", layout=layout, max_model_len=65536, max_num_seqs=256, max_num_batched_tokens=4096
    )
    buckets = decode_sizes(QWEN3_235B, layout, config.max_num_seqs, config.max_model_len)
    limits = Limits(max_num_seqs=256, max_num_batched_tokens=4096, context=65536)

    planned = fit(QWEN3_235B, Candidate(layout=layout, copies=1), device, limits)

    assert planned.work is not None
    free = device.memory_bytes - planned.work.weight_bytes
    held = step_bytes(QWEN3_235B, config, buckets)
    assert free * (1 - MEMORY_SHARE) < held == planned.workspace_bytes  # more than the share that is always left
    assert 0 <= free - held - planned.kv_bytes < planned.work.kv_token_bytes * BLOCK_SIZE
