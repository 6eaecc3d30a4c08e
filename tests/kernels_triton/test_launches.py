"""How many launches a decode step is: on a GPU each takes some microseconds, whatever it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install triton")

from triton.runtime.interpreter import InterpretedFunction

from bench.gpu_cases import Inputs
from bench.gpu_slice import RankSlice, WaitingGroup
from tests.real_models import QWEN3_4B, QWEN3_235B
from workers.batch import BatchBuilder
from workers.buckets import Bucket, Buckets
from workers.candidates import CandidateExchange
from workers.config import ModelConfig, ShardSpec
from workers.decode_steps import DecodeSteps
from workers.graphs import CallAgain
from workers.kernels.triton.choice import CHOICE_VARIABLE, has_triton
from workers.kv_pool import KVPool
from workers.sampling import Sampler
from workers.slots import SlotStates

NOWHERE = torch.device("meta")
"""Tensors there have shapes alone: a step of a real model takes no memory and no time."""
LONGEST = 4096


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Kernels of ours by name, which are not run."""
    counts = Counter[str]()

    def count(self: Any, *_args: Any, **_options: Any) -> None:
        counts[self.fn.__name__] += 1

    monkeypatch.setenv(CHOICE_VARIABLE, "interpret")
    monkeypatch.setattr(InterpretedFunction, "run", count)
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda kernel, _grid: lambda *_, **__: count(kernel))
    monkeypatch.setattr(Inputs, "on", lambda device: Inputs(device=device, dtype=torch.bfloat16, cache_bytes=0))
    monkeypatch.setattr(WaitingGroup, "all_gather", lambda group, x: x.new_empty(group.size, *x.shape))
    has_triton.cache_clear()
    yield counts
    monkeypatch.undo()
    has_triton.cache_clear()


class TorchLaunches(TorchDispatchMode):
    """Counts torch's operations, but for those that make room or another view."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = op.name().removeprefix("aten::")
        if not op.is_view and "empty" not in name and name not in ("_unsafe_view", "scalar_tensor"):
            self._counts[name] += 1
        return op(*args, **(kwargs or {}))


def decode_steps(model: ModelConfig, tp: int, num_seqs: int) -> DecodeSteps:
    rank = RankSlice(model, tp, NOWHERE)
    slots = SlotStates(num_seqs, LONGEST, rank.block_size, 1)
    kv = KVPool(model, rank.spec, 2, rank.block_size, NOWHERE, rank.inputs.dtype)
    batches = BatchBuilder(slots, model, NOWHERE, rank.inputs.dtype, 2)
    parts = [ShardSpec(rank.spec.layout, tp_rank).vocab(model) for tp_rank in range(tp)]
    sampler = Sampler(num_seqs, CandidateExchange(rank.decoder.layers[0].tp, parts), NOWHERE)
    last_tokens = torch.zeros(num_seqs + 1, dtype=torch.int64, device=NOWHERE)
    buckets = Buckets(num_seqs, LONGEST)
    return DecodeSteps(rank.decoder, sampler, batches, kv, last_tokens, buckets, CallAgain(), 1)


def launches(launched: Counter[str], model: ModelConfig, tp: int, num_seqs: int = 1) -> Counter[str]:
    """Of one step; those of collectives are not counted."""
    steps = decode_steps(model, tp, num_seqs)
    launched.clear()
    with torch.no_grad(), TorchLaunches(launched):
        steps._compute(Bucket(num_seqs, LONGEST))
    return launched.copy()


def of_a_layer(launched: Counter[str], model: ModelConfig, tp: int) -> tuple[Counter[str], Counter[str]]:
    """What each layer adds, and what is there besides."""
    one, two = (launches(launched, replace(model, num_layers=count), tp) for count in (1, 2))
    return two - one, one - (two - one)


def test_a_layer_of_the_4b_is_ten_launches_and_a_step_377(launched: Counter[str]) -> None:
    layer, others = of_a_layer(launched, QWEN3_4B, tp=1)
    assert layer == {
        "_norm_quantize": 2,
        "_fp8_gemm": 4,
        "_norm_rotate_store": 1,
        "_attend_split": 1,
        "_merge_quantize": 1,
        "_swiglu_quantize": 1,
    }
    assert others.total() == 17, others
    assert launches(launched, QWEN3_4B, tp=1).total() == 36 * 10 + 17


def test_a_layer_of_the_235b_is_fifteen_launches_and_two_sums_over_ranks(launched: Counter[str]) -> None:
    layer, others = of_a_layer(launched, QWEN3_235B, tp=8)
    assert layer == {
        "_norm_quantize": 2,
        "_fp8_gemm": 2,
        "_norm_rotate_store": 1,
        "_attend_split": 1,
        "_merge_quantize": 1,
        "_sum_splits": 1,
        "mm": 1,
        "_choose": 1,
        "_route": 1,
        "_grouped_gemm": 2,
        "_swiglu_quantize": 1,
        "_combine": 1,
    }
    assert others.total() == 22, others


def test_only_sizes_that_are_padded_keep_padding_from_experts(launched: Counter[str]) -> None:
    model = replace(QWEN3_235B, num_layers=1)
    assert "masked_fill.Scalar" not in launches(launched, model, tp=8, num_seqs=2)
    assert launches(launched, model, tp=8, num_seqs=4)["masked_fill.Scalar"] == 1
