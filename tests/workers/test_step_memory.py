"""What steps of a GPU hold beside weights and KV, at the shapes of the real models."""

from __future__ import annotations

import pytest

from tests.real_models import QWEN3_4B, QWEN3_235B
from workers.buckets import Buckets
from workers.config import ModelConfig, ParallelLayout, RunnerConfig
from workers.kv_memory import MEMORY_SHARE, default_kv_bytes
from workers.step_memory import step_bytes

GIB = 2**30


def held(model: ModelConfig, layout: ParallelLayout, *, recorded: bool = True, **changes: int) -> int:
    sizes = {"max_num_seqs": 64, "max_num_batched_tokens": 8192, "max_model_len": 32_768} | changes
    config = RunnerConfig(model_dir="", layout=layout, device="cuda", **sizes)
    buckets = Buckets(config.max_num_seqs, config.max_model_len) if recorded else None
    return step_bytes(model, config, buckets)


def test_recordings_of_a_long_context_hold_the_sums_of_their_largest_size() -> None:
    layout = ParallelLayout()
    recorded = held(QWEN3_4B, layout) - held(QWEN3_4B, layout, recorded=False)
    sums = 64 * 128 * 32 * 130 * 4  # rows, splits, heads, a head and two numbers in fp32
    assert 2 * sums < recorded < 5 * sums
    longer = held(QWEN3_4B, layout, max_model_len=262_144) - held(QWEN3_4B, layout)
    assert longer > 2 * 7 * sums, "eight times as long, run once and recorded once"


def test_a_prompt_holds_the_rows_that_it_sends_to_experts_of_many_groups() -> None:
    layout = ParallelLayout(tp=1, dp=8)
    longer = held(QWEN3_235B, layout, max_num_batched_tokens=16_384) - held(QWEN3_235B, layout)
    pairs = 8192 * 8  # of tokens and experts: even shares of eight ranks
    assert longer > pairs * (3 * 1536 + 2 * 4096) * 2


def test_pieces_between_collectives_hold_the_rows_of_all_groups() -> None:
    alone, grouped = (held(QWEN3_235B, ParallelLayout(tp=tp, dp=8 // tp)) for tp in (8, 4))
    prompts = [held(QWEN3_235B, ParallelLayout(tp=tp, dp=8 // tp), recorded=False) for tp in (8, 4)]
    assert grouped - prompts[1] > alone - prompts[0] + 64 * 8 * 4096 * 2


def test_an_h200_has_room_for_the_235b_and_a_small_gpu_keeps_room_for_its_steps() -> None:
    free, takes = 105 * GIB, held(QWEN3_235B, ParallelLayout(tp=4, dp=2))
    assert default_kv_bytes(free, "cuda", takes) == int(free * MEMORY_SHARE), "the share leaves more than steps take"
    free, takes = 12 * GIB, held(QWEN3_4B, ParallelLayout(), max_num_seqs=256)
    assert default_kv_bytes(free, "cuda", takes) == free - takes
    assert default_kv_bytes(GIB, "cuda", takes) == 0


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=2)], ids=str)
def test_more_slots_hold_more_logits(layout: ParallelLayout) -> None:
    assert held(QWEN3_4B, layout, max_num_seqs=256) > held(QWEN3_4B, layout) + 192 * 151_936 // layout.tp * 4
