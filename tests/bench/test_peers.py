"""The pure parts of the comparison: weights for the peers, figures, ratios, targets, and who is loaded together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.limits import Limits
from bench.peers.capacity import batches, groups
from bench.peers.cells import Cell, Figures, agreement, grid
from bench.peers.gguf_file import EXPERT_NAMES, gguf_name, is_expert, metadata
from bench.peers.protocol import RunReply
from bench.peers.registry import F32, MULL, MULL_BF16, MULL_GRPC, PEERS, Q8_0, VLLM_FP32
from bench.peers.results import CellResult, ShapeResult, throughput, tpot
from bench.peers.targets import Target, targets
from bench.peers.weights import Fp8Checkpoint, dequantised, e4m3_values
from bench.peers.work import Work
from workers.config import ModelConfig

POCKET = Path("deploy/models/pocket")
CELL = Cell(2, 8, 3, rounds=2, bound_s=1)


def test_every_e4m3_code_has_the_value_that_torch_gives_it() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(e4m3_values(), theirs)


def test_a_tile_cut_at_the_edge_has_its_own_scale() -> None:
    codes_NK = np.full((130, 129), 0x38, np.uint8)  # 1.0
    values_NK = dequantised(codes_NK, np.array([[1, 2], [3, 4]], np.float32))
    assert [values_NK[0, 0], values_NK[0, 128], values_NK[129, 127], values_NK[129, 128]] == [1, 2, 3, 4]


def test_every_tensor_of_a_checkpoint_has_a_name_in_gguf_and_no_two_the_same() -> None:
    checkpoint = Fp8Checkpoint(POCKET)
    names = [gguf_name(name) for name in checkpoint.names if not is_expert(name)]
    experts = [name for name in checkpoint.names if is_expert(name)]
    assert len(set(names)) == len(names)
    assert "blk.3.ffn_gate_inp.weight" in names
    assert {name.split(".")[-2] for name in experts} == set(EXPERT_NAMES)
    assert metadata(checkpoint.config)["expert_feed_forward_length"] == 128


def test_weights_of_the_peers_are_ours() -> None:
    checkpoint = Fp8Checkpoint(POCKET)
    stored_bytes = sum(file.stat().st_size for file in POCKET.glob("*.safetensors"))
    config = ModelConfig.from_dir(POCKET)
    work = Work.of(POCKET)
    assert 0.98 * stored_bytes < work.weight_bytes <= stored_bytes
    elements = work.num_parameters
    assert elements == sum(checkpoint.read(name).size for name in checkpoint.names)
    active = elements - 2 * config.vocab_size * config.hidden_size
    active -= 4 * 6 * 3 * config.hidden_size * config.moe_intermediate_size  # experts that a token has not
    assert work.multiplied == pytest.approx(active, rel=0.01)


def test_figures_are_of_the_times_of_tokens() -> None:
    reply = RunReply(times_s=[[1.0, 2.0, 4.0], [2.0, 3.0, 5.0]], tokens=[[1] * 3, [1] * 3], over=False)
    assert Figures.of(reply) == Figures(tokens_per_s=6 / 5, ttft_s=1.5, tpot_s=1.5)
    assert Figures.of(RunReply([[0.5]], [[1]], over=False)).tpot_s is None


def test_agreement_counts_up_to_the_first_other_token() -> None:
    assert agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == 4 / 5


def test_a_ratio_is_of_runs_of_the_same_turn() -> None:
    result = CellResult(CELL)
    result.figures[MULL] = {(1, 0): Figures(10, 1, 0.1), (1, 1): Figures(30, 1, 0.1), (2, 0): Figures(99, 1, 0.1)}
    result.figures[F32] = {(1, 0): Figures(5, 1, None), (1, 1): Figures(10, 1, 0.3)}
    result.figures[VLLM_FP32] = {(1, 0): Figures(1, 1, None)}
    ratio = result.ratio(MULL, F32, throughput)
    assert ratio is not None
    assert (ratio.min, ratio.max) == (2, 3)
    by_tpot = result.ratio(F32, MULL, tpot)
    assert by_tpot is not None
    assert by_tpot.runs == 1
    assert result.ratio(MULL, Q8_0, throughput) is None
    assert result.is_far_behind(F32)
    assert not result.is_far_behind(MULL)
    assert not result.is_far_behind(VLLM_FP32), "one round may be a bad one"
    assert not result.is_far_behind(Q8_0)


def test_a_ratio_of_engines_that_were_not_loaded_together_goes_by_way_of_ours() -> None:
    result = CellResult(CELL)
    result.figures[MULL] = {(1, 0): Figures(10, 1, 0.1), (2, 0): Figures(20, 1, 0.1)}
    result.figures[F32] = {(1, 0): Figures(5, 1, 0.1)}
    result.figures[MULL_GRPC] = {(2, 0): Figures(10, 1, 0.1)}
    ratio = result.ratio(MULL_GRPC, F32, throughput)
    assert ratio is not None
    assert ratio.median == 0.5 * 2


def test_prompts_are_the_same_for_every_engine_and_others_in_the_next_round() -> None:
    ids = range(100, 200)
    assert CELL.prompts(ids, 0) == CELL.prompts(ids, 0) != CELL.prompts(ids, 1)
    assert [len(prompt) for prompt in CELL.prompts(ids, 0)] == [8, 8]


def test_a_cell_is_read_as_it_is_written() -> None:
    cell = Cell.parse("8x32+16")
    assert (cell.streams, cell.prompt, cell.tokens_out) == (8, 32, 16)


def test_the_whole_grid_has_every_load_and_prompt() -> None:
    loads = {(cell.streams, cell.prompt) for cell in grid("dense-0.6b", full=True) if cell.tokens_out == 128}
    assert loads == {(streams, prompt) for streams in (1, 4, 8, 16, 32) for prompt in (32, 512, 4096)}


def test_ours_are_loaded_beside_every_peer_as_far_as_there_is_room() -> None:
    needs_mb = {MULL: 10, MULL_GRPC: 10, Q8_0: 30, F32: 60, VLLM_FP32: 50}
    assert groups(needs_mb, 100) == [[MULL, Q8_0, F32], [MULL, VLLM_FP32], [MULL, MULL_GRPC]]
    assert groups({MULL: 10, Q8_0: 200}, 100) == [[MULL]]
    assert groups({Q8_0: 30}, 100) == [[Q8_0]]
    assert groups({MULL: 60, MULL_GRPC: 60, Q8_0: 30, F32: 200}, 100) == [[MULL, Q8_0], [MULL_GRPC]]
    assert groups({MULL: 40, Q8_0: 30, F32: 80}, 100) == [[MULL, Q8_0], [F32]]


def test_cells_of_like_need_are_measured_without_loading_anew() -> None:
    results = [CellResult(cell) for cell in grid("dense-0.6b", full=True)]
    found = batches(results)
    assert sorted(str(it.cell) for batch in found for it in batch.items) == sorted(str(it.cell) for it in results)
    assert len(found) < 6
    short = found[0].room
    assert (short.max_streams, short.max_model_len) == (32, 4096 + 128 + 64)
    assert found[-1].room.kv_tokens == 32 * (4096 + 128 + 64)
    assert len(batches([CellResult(cell) for cell in grid("dense-0.6b", full=False)])) == 1


def test_a_target_is_held_against_the_peer_that_did_best() -> None:
    result = ShapeResult("pocket", [CellResult(Cell(32, 32, 64, rounds=1, bound_s=1), limits=[Limits(20, 100)])])
    speeds = {MULL: 100, Q8_0: 80, F32: 125, VLLM_FP32: 50}
    result.cells[0].figures = {name: {(1, 0): Figures(speed, 1, 0.1)} for name, speed in speeds.items()}
    llama, vllm = (target for target in targets(result, Work.of(POCKET)) if _is(target, MULL, "32 × 32"))
    assert (llama.against, llama.reached, llama.met) == (F32, 0.8, False)
    assert (vllm.reached, vllm.met) == (2.0, True)


def test_each_of_our_engines_is_held_against_the_peers() -> None:
    result = ShapeResult("pocket", [CellResult(Cell(1, 32, 64, rounds=1, bound_s=1), limits=[Limits(20, 100)])])
    speeds = {MULL: 300, MULL_BF16: 400, VLLM_FP32: 100}
    result.cells[0].figures = {name: {(1, 0): Figures(speed, 1, 0.1)} for name, speed in speeds.items()}
    found = targets(result, Work.of(POCKET))
    (fp32,) = (target for target in found if _is(target, MULL, "1 × 32"))
    (bf16,) = (target for target in found if _is(target, MULL_BF16, "1 × 32"))
    assert [(it.reached, it.met) for it in (fp32, bf16)] == [(3.0, False), (4.0, True)]


def _is(target: Target, engine: str, load: str) -> bool:
    return target.engine == engine and load in target.what


def test_no_peer_is_one_of_ours() -> None:
    assert not {MULL, MULL_BF16, MULL_GRPC} & set(PEERS)
