"""Libraries that need not be there: what we ask of them, shown by modules that compute it in plain torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install triton")

from tests.kernels_triton.values import DEVICE, normal, tile_weight
from workers.kernels import deep_gemm, deep_gemm_experts, flash_attention, optional, reference, scaled_mm
from workers.kernels.invariance import invariance
from workers.kernels.prefill_attention import Chunks, prefill_attention
from workers.kernels.triton import choice, experts, gemm
from workers.kernels.triton import reference as in_tiles
from workers.kernels.triton.rows import QuantizedRows

ROWS = 257


class FakeDeepGemm(ModuleType):
    """Refuses what the real one would misread."""

    def __init__(self) -> None:
        super().__init__("deep_gemm")
        self.num_calls = 0

    def fp8_gemm_nt(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor) -> None:
        self.num_calls += 1
        (codes, scale), (weight, weight_scale) = a, b
        rows, size_in = codes.shape
        assert codes.dtype == weight.dtype == torch.float8_e4m3fn
        assert codes.is_contiguous()
        assert weight.is_contiguous()
        assert weight_scale.is_contiguous()
        assert scale.stride() == (1, -(-rows // 4) * 4)  # rows side by side, aligned to 16 bytes
        assert d.dtype == torch.bfloat16
        dense = codes.float() * scale.repeat_interleave(128, 1)
        scales = weight_scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)
        d.copy_(dense @ (weight.float() * scales).t())
        assert size_in == weight.shape[1]

    def m_grouped_fp8_gemm_nt_contiguous(
        self,
        a: tuple[Tensor, Tensor],
        b: tuple[Tensor, Tensor],
        d: Tensor,
        grouped_layout: Tensor,
        *,
        use_psum_layout: bool,
        expected_m_for_psum_layout: int,
    ) -> None:
        """Of the newer versions, whose signature is in their docstrings: use_psum_layout"""
        assert use_psum_layout
        assert expected_m_for_psum_layout > 0
        assert grouped_layout.dtype == torch.int32
        assert len(grouped_layout) == len(b[0])
        assert len(d) % deep_gemm_experts.ALIGNMENT == 0
        d.fill_(torch.nan)  # what nobody computes is nobody's
        start = 0
        for expert, end in enumerate(grouped_layout.tolist()):
            assert start <= end <= len(d)
            if end > start:
                self._product(a, b, d, expert, slice(start, end))
            start = -(-end // deep_gemm_experts.ALIGNMENT) * deep_gemm_experts.ALIGNMENT

    def m_grouped_fp8_gemm_nt_masked(
        self,
        a: tuple[Tensor, Tensor],
        b: tuple[Tensor, Tensor],
        d: Tensor,
        masked_m: Tensor,
        expected_m: int,
    ) -> None:
        assert masked_m.dtype == torch.int32
        assert masked_m.is_contiguous()
        (experts, room, _), (_, tiles, size_in) = d.shape, (0, *a[1].shape[-1:], a[0].shape[-1])
        assert room % deep_gemm_experts.ALIGNMENT == 0
        assert 0 < expected_m <= room
        assert a[0].shape == (experts, room, size_in)
        assert a[1].stride() == (room * tiles, 1, room)  # rows side by side in each group
        d.fill_(torch.nan)
        for expert, count in enumerate(masked_m.tolist()):
            if count:
                self._product((a[0][expert], a[1][expert]), b, d[expert], expert, slice(0, count))

    def _product(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, expert: int, rows: slice) -> None:
        part = d.new_empty(rows.stop - rows.start, d.shape[1])
        codes, scale = a[0][rows], a[1][rows]
        padded = torch.empty(codes.shape[1] // 128, -(-len(codes) // 4) * 4).t()[: len(codes)]
        padded.copy_(scale)
        assert b[0].is_contiguous()
        assert b[1].is_contiguous()
        assert a[1].stride(-2) == 1
        self.fp8_gemm_nt((codes, padded), (b[0][expert], b[1][expert]), part)
        d[rows] = part


class FakeFlashAttention(ModuleType):
    """Looks pages up one by one."""

    def __init__(self) -> None:
        super().__init__("flash_attn_interface")
        self.num_calls = 0

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        page_table: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        causal: bool,
    ) -> Tensor:
        self.num_calls += 1
        assert k_cache.stride(-1) == v_cache.stride(-1) == 1
        assert {x.dtype for x in (cache_seqlens, page_table, cu_seqlens_q)} == {torch.int32}
        assert causal
        outs, page_size = [], k_cache.shape[1]
        for chunk, (first, stop) in enumerate(pairwise(cu_seqlens_q)):
            size, num_keys = int(stop - first), int(cache_seqlens[chunk])
            assert size <= max_seqlen_q
            pages = page_table[chunk, : math.ceil(num_keys / page_size)].long()
            k, v = (cache[pages].flatten(0, 1)[:num_keys].transpose(0, 1) for cache in (k_cache, v_cache))
            mask = torch.ones(size, num_keys, dtype=torch.bool).tril(num_keys - size)
            rows = q[first:stop].transpose(0, 1)
            outs.append(F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1))
        return torch.cat(outs)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeDeepGemm, FakeFlashAttention]]:
    """They are installed, on a Hopper GPU."""
    modules = FakeDeepGemm(), FakeFlashAttention()
    monkeypatch.setattr(optional, "importlib", FakeImports({module.__name__: module for module in modules}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv(choice.CHOICE_VARIABLE, raising=False)
    optional.installed.cache_clear()
    yield modules
    optional.installed.cache_clear()


class FakeImports:
    """importlib, which finds these."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self._modules = modules
        self.util = self

    def find_spec(self, name: str) -> ModuleType | None:
        return self._modules.get(name)

    def import_module(self, name: str) -> ModuleType:
        return self._modules[name]


ON_A_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="a fake computes on a CPU")


@ON_A_CPU
def test_a_prompts_product_is_deep_gemms_where_it_is_installed(
    fakes: tuple[FakeDeepGemm, FakeFlashAttention],
) -> None:
    plain = in_tiles.quantize(normal(1, ROWS, 256, dtype=torch.bfloat16))
    rows = QuantizedRows.empty(ROWS, 256, torch.bfloat16, DEVICE)
    rows.codes_RI.copy_(plain.codes_RI)
    rows.scale_Rk.copy_(plain.scale_Rk)
    weight = tile_weight(2, 192, 256)
    got = gemm.linear(rows, weight)
    assert fakes[0].num_calls == 1
    torch.testing.assert_close(got, in_tiles.linear(rows, weight).to(torch.bfloat16), rtol=1e-2, atol=1e-3)


def fake_scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, recipe_a: object, scale_b: Tensor, recipe_b: object
) -> Tensor:
    """torch's, with what it demands on a GPU."""
    (rows, size_in), (_, outputs), padded_tiles = a.shape, b.shape, -(-a.shape[1] // 512) * 4
    assert (recipe_a, recipe_b) == (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128)
    assert rows % 4 == 0
    assert (scale_a.shape, scale_a.stride()) == ((rows, size_in // 128), (1, rows))
    assert (scale_b.shape, scale_b.stride()) == ((padded_tiles, -(-outputs // 128)), (1, padded_tiles))
    scales = scale_b[: size_in // 128].repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :outputs]
    return ((a.float() * scale_a.repeat_interleave(128, 1)) @ (b.float() * scales)).to(torch.bfloat16)


@pytest.fixture
def torch_alone(fakes: tuple[FakeDeepGemm, FakeFlashAttention], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hopper GPU without libraries."""
    del fakes
    monkeypatch.setattr(optional, "importlib", FakeImports({}))
    scaled_mm._is_right.cache_clear()
    yield
    scaled_mm._is_right.cache_clear()


@pytest.mark.usefixtures("torch_alone")
@ON_A_CPU
def test_a_prompts_product_is_torchs_where_there_is_no_deep_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", fake_scaled_mm)
    rows, weight = QuantizedRows.empty(ROWS, 256, torch.bfloat16, DEVICE), tile_weight(2, 192, 256)
    plain = in_tiles.quantize(normal(1, ROWS, 256, dtype=torch.bfloat16))
    rows.codes_RI.copy_(plain.codes_RI)
    rows.scale_Rk.copy_(plain.scale_Rk)
    monkeypatch.setattr(gemm, "own_product", lambda *_: pytest.fail("torch's fits"))
    torch.testing.assert_close(gemm.linear(rows, weight), in_tiles.linear(rows, weight), rtol=1e-2, atol=1e-3)
    with invariance(True):
        assert not scaled_mm.is_chosen(rows, weight)
    assert not scaled_mm.is_chosen(QuantizedRows.empty(255, 256, torch.bfloat16, DEVICE), weight)


@pytest.mark.usefixtures("torch_alone")
@ON_A_CPU
@pytest.mark.parametrize("failure", ["wrong", "refused"])
def test_torchs_product_is_not_taken_where_it_answers_wrongly(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(a: Tensor, b: Tensor, scale_a: Tensor, recipe_a: object, scale_b: Tensor, recipe_b: object) -> Tensor:
        if failure == "refused":
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return fake_scaled_mm(a, b, scale_a, recipe_a, scale_b.flip(1).t().contiguous().t(), recipe_b)

    monkeypatch.setattr(F, "scaled_mm", fail)
    rows = QuantizedRows.empty(ROWS, 256, torch.bfloat16, DEVICE)
    assert not scaled_mm.is_chosen(rows, tile_weight(2, 192, 256))


@ON_A_CPU
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, on whom the interpreter stands
@pytest.mark.parametrize("pairs_from", [1, 100], ids=["contiguous", "masked"])
def test_experts_products_are_deep_gemms_where_it_is_installed(
    pairs_from: int, fakes: tuple[FakeDeepGemm, FakeFlashAttention], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deep_gemm_experts, "MIN_TOKENS", 5)
    monkeypatch.setattr(deep_gemm_experts, "ALIGNMENT", 8)  # of 128 the interpreter would take seconds
    monkeypatch.setattr(deep_gemm_experts, "CONTIGUOUS_FROM_PAIRS", pairs_from)
    # Of experts 1 to 4, which are here, 3 has no token, and 1 and 4 have different numbers of them.
    slots = torch.tensor([[1, 4], [0, 2], [2, 4], [5, 4], [1, 0]])
    x, weights = normal(1, 5, 256, dtype=torch.bfloat16), normal(2, 5, 2).abs().to(torch.bfloat16)
    gate_up, down = tile_weight(3, 4, 256, 256), tile_weight(4, 4, 256, 128)
    got = experts.apply_experts(x, slots, weights, gate_up, down, 1)
    assert fakes[0].num_calls == 2 * 3
    want = in_tiles.apply_experts(x.float(), slots, weights.float(), gate_up, down, 1)
    torch.testing.assert_close(got.float(), want, rtol=3e-2, atol=3e-2 * float(want.abs().max()))


def test_an_older_deep_gemm_computes_no_experts(
    fakes: tuple[FakeDeepGemm, FakeFlashAttention], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weights = torch.empty(64, 128, dtype=torch.bfloat16), (tile_weight(0, 1, 256, 128), tile_weight(1, 1, 128, 128))
    assert deep_gemm_experts.library_for(x, *weights) is fakes[0]
    assert deep_gemm_experts.library_for(x[:63], *weights) is None
    with invariance(True):
        assert deep_gemm_experts.library_for(x, *weights) is None
    monkeypatch.setattr(fakes[0], "m_grouped_fp8_gemm_nt_contiguous", lambda: None)  # has no docstring
    assert deep_gemm_experts.library_for(x, *weights) is None


@ON_A_CPU
def test_chunks_attend_by_flash_attention_where_it_is_installed(
    fakes: tuple[FakeDeepGemm, FakeFlashAttention], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.kernels.prefill_attention.native", lambda: None)
    monkeypatch.setattr("workers.kernels.prefill_attention.has_triton", lambda _: True)
    pool = normal(3, 4, 6, 16, 64, dtype=torch.float16)
    tables = torch.tensor([[4, 1, 5], [2, 0, 3]])
    chunks = Chunks(tables_CM=tables, starts=np.array([20, 0]), sizes=np.array([7, 18]))
    q = normal(4, 25, 8, 64, dtype=torch.float16)
    got = prefill_attention(q, normal(5, 25, 4, 64, dtype=torch.float16), pool, chunks)
    assert fakes[1].num_calls == 1
    want = reference.prefill_attention(q.float(), pool.float(), chunks)
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=3e-3)


def test_few_rows_odd_shapes_and_other_types_are_our_own_kernels() -> None:
    assert deep_gemm.fits(256, (192, 256), torch.bfloat16)
    assert not deep_gemm.fits(255, (192, 256), torch.bfloat16)
    assert not deep_gemm.fits(256, (200, 256), torch.bfloat16)
    assert not deep_gemm.fits(256, (192, 256), torch.float32)
    assert flash_attention.fits(128, torch.bfloat16, torch.bfloat16)
    assert not flash_attention.fits(128, torch.bfloat16, torch.float8_e4m3fn)
    assert not flash_attention.fits(96, torch.bfloat16, torch.bfloat16)


@pytest.mark.usefixtures("fakes")
def test_a_deterministic_rank_and_one_that_is_told_so_use_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    q, pool = torch.empty(1, 1, 128, dtype=torch.bfloat16), torch.empty(2, 1, 1, 128, dtype=torch.bfloat16)
    assert flash_attention.library_for(q, pool) is not None
    with invariance(True):
        assert flash_attention.library_for(q, pool) is None
    monkeypatch.setenv(choice.CHOICE_VARIABLE, "triton")
    optional.installed.cache_clear()
    assert flash_attention.library_for(q, pool) is None


def test_without_a_gpu_nothing_is_imported() -> None:
    optional.installed.cache_clear()
    if not torch.cuda.is_available():
        assert optional.installed("deep_gemm") is None
        assert "deep_gemm" not in sys.modules
