"""The whole decoder through the GPU's kernels: loading, prefill, chunks, decode and sampling, against the CPU's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install triton")

from tests.checkpoints import DENSE, MOE, write_checkpoint
from tests.workers.engine import Ran, decode_steps, load, open_slot, random_prompts, run, whole_prompts
from workers.checkpoint import Checkpoint
from workers.config import ParallelLayout, ShardSpec
from workers.kernels.cpu.library import CHOICE_VARIABLE as CPU_CHOICE
from workers.kernels.cpu.library import native
from workers.kernels.tiles import TileWeight
from workers.kernels.triton import experts, feed_forward, reference
from workers.kernels.triton.choice import CHOICE_VARIABLE, has_triton
from workers.kernels.triton.rows import QuantizedRows
from workers.runner import ModelRunner
from workers.step import Prefill, StepPlan

SMALL = {"num_hidden_layers": 1, "vocab_size": 200, "eos_token_id": 199, "mlp_only_layers": []}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's kernels compute on a CPU, too, and mull's own for CPUs do not."""
    monkeypatch.setenv(CHOICE_VARIABLE, "interpret")
    monkeypatch.setenv(CPU_CHOICE, "torch")
    for cached in (has_triton, native):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (has_triton, native):
        cached.cache_clear()


def plans() -> list[StepPlan]:
    """Two prompts, of which one comes in two chunks, and a decode of both."""
    first, second = random_prompts([2, 5], SMALL["vocab_size"])
    return [
        StepPlan(
            step=1,
            open=[open_slot(0), open_slot(1)],
            prefills=[Prefill(0, 0, first, True), Prefill(1, 0, second[:3], False)],
        ),
        StepPlan(step=2, decodes=[0], prefills=[Prefill(1, 3, second[3:], True)]),
        *decode_steps([0, 1], 1),
    ]


def started(directory: Path) -> ModelRunner:
    """Blocks of one token leave out the warm-up."""
    return load(directory, block_size=1)


def relative_error(got: Ran, want: Ran) -> float:
    """Root mean square over all logits."""
    assert [logits.shape for logits in got.logits] == [logits.shape for logits in want.logits]
    difference = torch.cat([(a - b).flatten() for a, b in zip(got.logits, want.logits, strict=True)])
    return float(difference.square().mean() / torch.cat([x.flatten() for x in want.logits]).square().mean()) ** 0.5


def test_an_unquantised_model_gives_the_logits_of_the_cpu(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    directory = write_checkpoint(tmp_path, MOE, fp8=False, **SMALL)
    want = run(started(directory), plans())
    request.getfixturevalue("interpreted")
    got = run(started(directory), plans())
    assert relative_error(got, want) < 1e-4
    assert got.tokens == want.tokens


def test_an_fp8_model_differs_from_the_cpu_by_the_rounding_of_activations_alone(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    directory = write_checkpoint(tmp_path, DENSE, fp8=True, **SMALL)
    prompts = [whole_prompts(random_prompts([2, 5], SMALL["vocab_size"]))]  # no token that was sampled goes on
    want = run(started(directory), prompts)
    request.getfixturevalue("interpreted")
    got = run(started(directory), prompts)
    assert 0.005 < relative_error(got, want) < 0.1  # 2.6 % for each of four products, one behind the other


@pytest.mark.usefixtures("interpreted")
def test_an_fp8_model_gives_the_logits_of_the_reference_that_rounds_as_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_checkpoint(tmp_path, MOE, fp8=True, **SMALL)
    runner, orders = started(directory), [whole_prompts(random_prompts([1, 3], SMALL["vocab_size"]))]
    kinds = {name.split(".")[-1] for name, weight in runner._weights.items() if isinstance(weight, TileWeight)}
    assert kinds == {"qkv", "o", "gate_up", "down"}
    got = run(runner, orders)

    monkeypatch.setattr(feed_forward, "linear", plain_linear)
    monkeypatch.setattr(experts, "apply_experts", reference.apply_experts)

    want = run(runner, [StepPlan(step=9, close=[0, 1]), *orders])
    # Another order of fp32 sums moves a few activations to the next code.
    assert relative_error(got, want) < 1e-3


def plain_linear(x: Tensor | QuantizedRows, weight: TileWeight) -> Tensor:
    return reference.linear(x if isinstance(x, QuantizedRows) else reference.quantize(x), weight)


class NoLooks(TorchDispatchMode):
    """Fails where values of a tensor become Python's, or shapes depend on them: a captured step cannot have that."""

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = op.name()
        assert not any(
            look in name for look in ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select")
        )
        return op(*args, **(kwargs or {}))


@pytest.mark.usefixtures("interpreted")
def test_a_decode_step_asks_the_device_for_nothing_until_tokens_are_chosen(tmp_path: Path) -> None:
    runner = started(write_checkpoint(tmp_path, MOE, fp8=True, **SMALL))
    runner.execute(whole_prompts(random_prompts([1, 2], SMALL["vocab_size"])))
    batch = runner.batches.build(decode_steps([0, 1], 1)[0], runner.last_tokens)
    with torch.inference_mode(), NoLooks():
        logits = runner.decoder.logits(runner.decoder.forward(batch, runner.kv))
        runner.sampler.exchange.likeliest(logits, 8)


@pytest.mark.parametrize(("tp", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_the_tiles_of_a_rank_stand_for_its_slice(
    tp: int, rank: int, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, MOE, fp8=True))
    spec = ShardSpec(ParallelLayout(tp=tp), rank)
    request.getfixturevalue("interpreted")
    tiles = checkpoint.read(spec)
    monkeypatch.setenv(CHOICE_VARIABLE, "torch")
    has_triton.cache_clear()
    floats = checkpoint.read(spec)
    assert any(isinstance(weight, TileWeight) for weight in tiles.values())
    for name, weight in tiles.items():
        values, want = weight.dense() if isinstance(weight, TileWeight) else weight, floats[name]
        held = slice(len(spec.experts(checkpoint.config)) if ".experts." in name else None)  # a slot may stay empty
        assert torch.equal(values[held], want[held]), name


def padded(directory: Path, **changes: Any) -> ModelRunner:
    """The sizes of two and of three rows are enough."""
    return load(directory, block_size=1, max_num_seqs=3, max_model_len=16, **changes)


@pytest.mark.whole_steps
@pytest.mark.usefixtures("interpreted")
def test_a_padded_decode_step_gives_the_bits_of_the_rows_alone(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, MOE, fp8=True, **SMALL)
    orders = [*plans(), *decode_steps([1], 1)]
    want, got = (run(padded(directory, graphs=graphs), orders) for graphs in ("off", "whole"))
    assert got.tokens == want.tokens
    pairs = [(a[: len(b)], b) for a, b in zip(got.logits, want.logits, strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.whole_steps
@pytest.mark.usefixtures("interpreted")
def test_a_deterministic_rank_gives_the_bits_of_a_decode_to_known_tokens_in_any_batch(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, MOE, fp8=True, **SMALL)
    quiet, busy = padded(directory, deterministic=True), padded(directory, deterministic=True, graphs="whole")
    prompts = random_prompts([3, 2], SMALL["vocab_size"])
    first = run(quiet, [whole_prompts(prompts[:1]), *decode_steps([0], 2)])
    sampled = [tokens[0] for tokens in first.tokens]
    known = prompts[0] + sampled[:2]
    beside = StepPlan(
        step=1,
        open=[open_slot(0), open_slot(1)],
        prefills=[Prefill(0, 0, prompts[1], True), Prefill(1, 0, known[:4], False)],
    )
    got = run(busy, [beside, StepPlan(step=2, decodes=[0], prefills=[Prefill(1, 4, known[4:], True)])])
    assert torch.equal(got.logits[-1][0], first.logits[-1][0])
    for one, other in zip(quiet.kv.layers, busy.kv.layers, strict=True):
        assert torch.equal(one[:, quiet.slots.blocks[0, :5]], other[:, busy.slots.blocks[1, :5]])


@pytest.mark.usefixtures("interpreted")
def test_fp8_keys_and_values_take_a_quarter_of_the_memory_and_cost_a_rounding(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, DENSE, fp8=False, **SMALL)
    exact, rounded = padded(directory), padded(directory, kv_dtype="fp8", graphs="whole")
    want, got = run(exact, plans()), run(rounded, plans())
    assert rounded.kv_bytes < exact.kv_bytes / 3
    error = max(float((a[:1] - b[:1]).norm() / b[:1].norm()) for a, b in zip(got.logits, want.logits, strict=True))
    assert 1e-5 < error < 0.1  # three bits behind the first, of each key and value
