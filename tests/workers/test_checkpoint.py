"""Reading a rank's slice: exactly its bytes, little memory, and the right values."""

from __future__ import annotations

import ctypes
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import DENSE, MOE, dequantize, read_tensors, write_checkpoint
from tests.processes import fork_server
from workers.checkpoint import Checkpoint, OpenShard
from workers.config import ParallelLayout, ShardSpec
from workers.errors import LayoutError
from workers.kernels.cpu.panels import dense
from workers.layout import Span

LARGE = DENSE | {"hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 8192, "num_hidden_layers": 3}
LAYOUTS = [(1, 0), (2, 0), (2, 1)]


def spec_of(tp: int, rank: int) -> ShardSpec:
    return ShardSpec(ParallelLayout(tp=tp), rank)


def bytes_read_by_this_process() -> int:
    """What read calls returned, as the kernel counts it."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def memory_bytes(field: str) -> int:
    """VmRSS, the resident size, or VmHWM, its peak, of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def reading_in_this_process(directory: Path, warm_up: Path, spec: ShardSpec) -> tuple[int, list[int]]:
    """By how much memory grew at most, and the sizes of the parameters that were read."""
    Checkpoint.open(warm_up).read(spec)  # pages in torch's code, which is no memory of the reader
    ctypes.CDLL(None).malloc_trim(0)  # nor may the reader take up what this has freed unseen
    start = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts afresh
    params = Checkpoint.open(directory).read(spec)
    return memory_bytes("VmHWM") - start, [param.nbytes for param in params.values()]


@pytest.mark.parametrize(("tp", "rank"), LAYOUTS)
@pytest.mark.parametrize("base", [DENSE, MOE], ids=["dense", "moe"])
def test_the_fused_parameters_are_the_dequantised_tensors(
    tmp_path: Path, base: dict[str, object], tp: int, rank: int
) -> None:
    directory = write_checkpoint(tmp_path, base, fp8=True)
    stored = read_tensors(directory)
    plain = {
        name: tensor.float() if f"{name}_scale_inv" not in stored else dequantize(tensor, stored[f"{name}_scale_inv"])
        for name, tensor in stored.items()
    }

    params = Checkpoint.open(directory).read(spec_of(tp, rank))

    heads, kv = slice(rank * 512 // tp, (rank + 1) * 512 // tp), slice(rank * 256 // tp, (rank + 1) * 256 // tp)
    attention = "model.layers.1.self_attn"
    qkv = [plain[f"{attention}.q_proj.weight"][heads], *(plain[f"{attention}.{x}_proj.weight"][kv] for x in "kv")]
    torch.testing.assert_close(dense(params["layers.1.qkv"]), torch.cat(qkv), rtol=0, atol=0)
    torch.testing.assert_close(
        dense(params["layers.1.o"]), plain[f"{attention}.o_proj.weight"][:, heads], rtol=0, atol=0
    )
    ffn = slice((3 * rank // tp) * 128, (3 * (rank + 1) // tp) * 128)
    gate_up = torch.cat([plain[f"model.layers.1.mlp.{name}_proj.weight"][ffn] for name in ("gate", "up")])
    torch.testing.assert_close(dense(params["layers.1.gate_up"]), gate_up, rtol=0, atol=0)
    down = plain["model.layers.1.mlp.down_proj.weight"][:, ffn]
    torch.testing.assert_close(dense(params["layers.1.down"]), down, rtol=0, atol=0)
    vocab = slice(301 * rank // tp, 301 * (rank + 1) // tp)
    torch.testing.assert_close(dense(params["embed"]), plain["model.embed_tokens.weight"][vocab], rtol=0, atol=0)


@pytest.mark.parametrize(("tp", "rank"), LAYOUTS)
def test_a_rank_holds_its_whole_experts(moe_fp8: Path, tp: int, rank: int) -> None:
    stored = read_tensors(moe_fp8)
    params = Checkpoint.open(moe_fp8).read(spec_of(tp, rank))
    first, last = 5 * rank // tp, 5 * (rank + 1) // tp
    assert params["layers.0.experts.down"].shape[0] == -(-5 // tp)  # every rank has as many slots; one may be empty
    for expert in range(first, last):
        name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
        want = dequantize(stored[name], stored[f"{name}_scale_inv"])
        assert torch.equal(dense(params["layers.0.experts.gate_up"])[expert - first, 128:], want)


@pytest.fixture(scope="module", params=[True, False], ids=["fp8", "bf16"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("large"), LARGE, fp8=request.param)


@pytest.mark.parametrize(("tp", "rank"), LAYOUTS)
def test_a_rank_reads_hardly_more_than_its_slice(large: Path, tp: int, rank: int) -> None:
    before = bytes_read_by_this_process()
    checkpoint = Checkpoint.open(large)
    checkpoint.read(spec_of(tp, rank))
    assert bytes_read_by_this_process() - before <= 1.02 * checkpoint.slice_bytes(spec_of(tp, rank))


@pytest.mark.parametrize(("tp", "rank"), LAYOUTS)
def test_reading_holds_at_most_one_tensor_beside_the_slice(large: Path, moe_fp8: Path, tp: int, rank: int) -> None:
    # given: a process that has freed no memory which the reader could take up unseen
    with ProcessPoolExecutor(1, mp_context=fork_server()) as process:
        # when
        peak_bytes, param_bytes = process.submit(reading_in_this_process, large, moe_fp8, spec_of(tp, rank)).result()
    # then: the bound; the lower one shows that the peak was seen at all
    assert sum(param_bytes) <= peak_bytes <= sum(param_bytes) + max(param_bytes)


def test_two_ranks_read_every_byte_once_but_for_what_both_hold(large: Path) -> None:
    checkpoint = Checkpoint.open(large)
    whole, halves = checkpoint.slice_bytes(spec_of(1, 0)), [checkpoint.slice_bytes(spec_of(2, rank)) for rank in (0, 1)]
    norms = sum(tensor.nbytes for name, tensor in read_tensors(large).items() if "norm" in name)
    assert sum(halves) == whole + norms


def test_progress_grows_to_the_total(moe_fp8: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = Checkpoint.open(moe_fp8)
    checkpoint.read(spec_of(2, 1), lambda read, total: seen.append((read, total)))
    assert [read for read, _ in seen] == sorted({read for read, _ in seen})
    assert seen[-1] == (checkpoint.slice_bytes(spec_of(2, 1)),) * 2


def test_an_impossible_layout_is_refused_before_any_weight_is_read(moe_fp8: Path) -> None:
    checkpoint = Checkpoint.open(moe_fp8)
    with pytest.raises(LayoutError):
        checkpoint.read(spec_of(3, 0), lambda _read, _total: pytest.fail("read a weight"))


def test_a_single_file_without_an_index_loads(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    directory = write_checkpoint(tmp_path, DENSE, fp8=False)
    tensors = read_tensors(directory)
    for file in (*directory.glob("*.safetensors"), *directory.glob("*.index.json")):
        file.unlink()
    save_file(tensors, directory / "model.safetensors")
    params = Checkpoint.open(directory).read(spec_of(1, 0))
    assert torch.equal(params["norm"], tensors["model.norm.weight"].float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_checkpoints_load(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    directory = write_checkpoint(tmp_path, DENSE, fp8=False)
    tensors = {name: tensor.to(dtype) for name, tensor in read_tensors(directory).items()}
    for file in (*directory.glob("*.safetensors"), *directory.glob("*.index.json")):
        file.unlink()
    save_file(tensors, directory / "model.safetensors")
    params = Checkpoint.open(directory).read(spec_of(1, 0))
    assert torch.equal(dense(params["embed"]), tensors["model.embed_tokens.weight"].float())


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_gpu_is_read_for_into_memory_that_it_copies_from_by_itself(
    is_pinned: bool, dense_fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU there is none: it shows whether it is asked for."""
    name, asked, real = "model.norm.weight", list[bool](), torch.empty
    want = read_tensors(dense_fp8)[name]

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return real(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty)
    stored = Checkpoint.open(dense_fp8).tensors[name]
    with OpenShard(stored.file, is_pinned=is_pinned) as shard:
        got = shard.read(name, stored, Span(0, len(want)), None)
    assert asked == [is_pinned]
    assert torch.equal(got.view(want.dtype), want)
