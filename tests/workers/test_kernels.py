"""Every kernel against its plain reference, on random and odd shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from workers.kernels import reference
from workers.kernels.cpu.library import BUILDS, CHOICE_VARIABLE, multiplies_bf16, native, runnable
from workers.kernels.cpu.panels import PanelWeight, Products, Tiling, dense
from workers.kernels.decode_attention import PagedKeys, decode_attention
from workers.kernels.dequant import dequantize_into
from workers.kernels.gate import choose_experts
from workers.kernels.linear import empty_weight, linear, rows_of, swiglu_linear
from workers.kernels.moe import apply_experts
from workers.kernels.norm import add_rms_norm, rms_norm
from workers.kernels.prefill_attention import Chunks, prefill_attention
from workers.kernels.qk_norm_rope import qk_norm_rope_store
from workers.kernels.swiglu import swiglu

SEEDS = st.integers(0, 2**31)
KV_DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
RUNNABLE = runnable()


def chosen(choice: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if choice != "torch" and choice not in RUNNABLE:
        pytest.skip(f"this CPU runs {RUNNABLE or 'neither AVX2 nor AVX-512'}, not {choice}")
    monkeypatch.setenv(CHOICE_VARIABLE, choice)
    native.cache_clear()
    assert (native() is None) == (choice == "torch"), f"no {choice} kernels were compiled; is there a compiler?"
    yield choice
    native.cache_clear()


@pytest.fixture(params=[*BUILDS, "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every implementation that this machine can run."""
    yield from chosen(request.param, monkeypatch)


@pytest.fixture(params=BUILDS)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The compiled ones, for what only they read."""
    yield from chosen(request.param, monkeypatch)


def close(got: Tensor, want: Tensor) -> None:
    """fp32 sums in another order differ in the last bits."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 9),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    origin=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=SEEDS,
)
def test_dequantisation_is_exact_at_any_origin(
    rows: int, cols: int, block: tuple[int, int], origin: tuple[int, int], seed: int
) -> None:
    origin = (origin[0] % block[0], origin[1] % block[1])
    bits = torch.randint(0, 256, (rows, cols), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    tiles = [-(-(size + first) // step) for size, first, step in zip((rows, cols), origin, block, strict=True)]
    scale = normal(seed, *tiles).abs().to(torch.bfloat16)
    got, want = torch.empty(rows, cols), torch.empty(rows, cols)

    dequantize_into(got, bits, scale, block=block, origin=origin)

    reference.dequantize_into(want, bits, scale, block=block, origin=origin)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_dequantisation_covers_every_e4m3_value_without_nan() -> None:
    bits = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8).view(2, -1)
    got = torch.empty(bits.shape)
    dequantize_into(got, bits, torch.ones(1, 1), block=(128, 128), origin=(0, 0))
    assert torch.equal(got, bits.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (33, 130, 65)])
def test_linear_equals_its_reference(shape: tuple[int, int, int]) -> None:
    rows, size_in, size_out = shape
    x, weight = normal(0, rows, size_in), normal(1, size_out, size_in)
    close(linear(x, weight), reference.linear(x, weight))
    close(linear(x, empty_weight((size_out, size_in), x.dtype, x.device).copy_(weight)), reference.linear(x, weight))


def stored(seed: int, kind: str, *shape: int) -> Tensor:
    """Random values as a checkpoint stores them; of e4m3 every code but NaN."""
    if kind == "e4m3":
        codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return torch.where(codes & 0x7F == 0x7F, torch.tensor(0x7E, dtype=torch.uint8), codes)
    return normal(seed, *shape).to({"bf16": torch.bfloat16, "fp32": torch.float32}[kind])


def panel_weight(seed: int, kind: str, shape: tuple[int, ...], tiling: Tiling, *, is_paired: bool) -> PanelWeight:
    """A weight [O, I] or [e, O, I] in panels, with a scale of its own for every row and tile."""
    kind, _, products = kind.partition(" in ")
    values = stored(seed, kind, *shape)
    weight = PanelWeight.empty(
        shape,
        values.dtype,
        tiling if kind == "e4m3" else None,
        is_paired=is_paired,
        products="bf16" if products else "fp32",
    )
    num_experts, (num_rows, num_inputs) = (1 if len(shape) == 2 else shape[0]), shape[-2:]
    for expert, values_OI in enumerate(values.view(num_experts, num_rows, num_inputs)):
        middle = num_rows // 2  # in two pieces, as a reader stores them
        for start, stop in ((0, middle), (middle, num_rows)):
            weight.store_rows(expert, start, values_OI[start:stop])
            if kind == "e4m3":
                scale_Rt = normal(seed + 1, stop - start, tiling.count(num_inputs)).abs().mul_(0.01)
                weight.store_scales(expert, start, scale_Rt.to(torch.bfloat16))
    return weight


def accurate(got: Tensor, x_TI: Tensor, weight_OI: Tensor) -> None:
    """A product to fp32 rounding, measured by the sizes of what is added: e4m3 spans six orders of magnitude."""
    x, weight = x_TI.double(), weight_OI.double()
    assert ((got - x @ weight.T).abs() <= 1e-6 * (x.abs() @ weight.abs().T)).all()


def as_multiplied(x_TI: Tensor, weight: PanelWeight) -> Tensor:
    """Rows as this weight's products take them."""
    return x_TI.bfloat16().float() if weight.products == "bf16" else x_TI


KINDS = ["e4m3", "bf16", "fp32"]
KINDS_IN_BF16 = ["e4m3 in bf16", "bf16 in bf16"]
EVERY_KIND = pytest.mark.parametrize(
    ("compiled", "kind"),
    [*itertools.product(BUILDS, KINDS), *itertools.product(["avx512bf16"], KINDS_IN_BF16)],
    indirect=["compiled"],
)
"""What is stored, and what products take where that is not fp32: one build has those."""


@pytest.mark.usefixtures("compiled")
@EVERY_KIND
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.sampled_from([1, 2, 6, 7, 13, 97, 200]),
    size_in=st.sampled_from([1, 70, 128, 130, 400]),
    size_out=st.sampled_from([1, 63, 64, 65, 200]),
    tiling=st.builds(Tiling, first=st.sampled_from([1, 100, 128]), size=st.sampled_from([128, 160])),
    seed=SEEDS,
)
def test_panels_multiply_like_the_weight_they_stand_for(
    kind: str, num_rows: int, size_in: int, size_out: int, tiling: Tiling, seed: int
) -> None:
    weight = panel_weight(seed, kind, (size_out, size_in), tiling, is_paired=False)
    x = normal(seed, num_rows, size_in)
    accurate(linear(x, weight), as_multiplied(x, weight), dense(weight))


@pytest.mark.usefixtures("compiled")
@EVERY_KIND
@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 130), (10, 33), (70, 200)])
def test_rows_of_panels_are_rows_of_the_weight(kind: str, start: int, stop: int) -> None:
    weight = panel_weight(0, kind, (200, 150), Tiling(first=22, size=128), is_paired=False)
    x = normal(1, 5, 150)
    assert torch.equal(dense(rows_of(weight, start, stop)), dense(weight)[start:stop])
    assert torch.equal(linear(x, rows_of(weight, start, stop)), linear(x, weight)[:, start:stop])


@pytest.mark.usefixtures("compiled")
@EVERY_KIND
@pytest.mark.parametrize("num_rows", [1, 9, 100])
@pytest.mark.parametrize("half", [1, 31, 96, 130])
def test_paired_panels_apply_the_activation(kind: str, num_rows: int, half: int) -> None:
    weight = panel_weight(half, kind, (2 * half, 140), Tiling(first=128, size=128), is_paired=True)
    x = normal(1, num_rows, 140) * 0.02
    gate, up = (as_multiplied(x, weight).double() @ dense(weight).double().T).chunk(2, dim=1)
    got = swiglu_linear(x, weight)
    torch.testing.assert_close(got.double(), gate / (1 + torch.exp(-gate)) * up, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("compiled")
@EVERY_KIND
def test_a_row_has_the_same_bits_whatever_stands_beside_it(kind: str) -> None:
    weight = panel_weight(0, kind, (130, 300), Tiling(first=100, size=128), is_paired=False)
    x = normal(1, 150, 300)
    together = linear(x, weight)
    for rows in (slice(0, 1), slice(3, 9), slice(40, 53), slice(10, 140)):
        assert torch.equal(linear(x[rows], weight), together[rows])


@pytest.mark.usefixtures("compiled")
def test_inputs_of_which_two_can_be_of_different_tiles_are_multiplied_in_fp32() -> None:
    for inputs, first, size in ((141, 128, 128), (140, 127, 128), (140, 128, 129)):
        tiling = Tiling(first=first, size=size)
        weight = PanelWeight.empty((8, inputs), torch.uint8, tiling, is_paired=False, products="bf16")
        assert weight.products == "fp32"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("num_rows_of_table", [40, 64])
def test_rows_are_looked_up_in_panels(num_rows_of_table: int) -> None:
    for kind in ("bf16", "bf16 in bf16") if multiplies_bf16() else ("bf16",):
        weight = panel_weight(0, kind, (num_rows_of_table, 30), Tiling(first=30, size=30), is_paired=False)
        ids = torch.tensor([0, 33, 31, 39, 33])
        assert torch.equal(weight.lookup(ids), dense(weight)[ids])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("num_inputs", [1, 2])
def test_every_e4m3_code_is_read_as_torch_reads_it(num_inputs: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1)
    products: Products = "bf16" if num_inputs == 2 and multiplies_bf16() else "fp32"
    weight = PanelWeight.empty(
        (256, num_inputs), torch.uint8, Tiling(first=128, size=128), is_paired=False, products=products
    )
    weight.store_rows(0, 0, torch.nn.functional.pad(codes, (num_inputs - 1, 0)))
    weight.store_scales(0, 0, torch.ones(256, 1))
    want = codes.view(torch.float8_e4m3fn).float()
    for num_rows in (1, 20):
        got = linear(torch.ones(num_rows, num_inputs), weight)
        torch.testing.assert_close(got, want.T.expand(num_rows, -1), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(dense(weight)[:, -1:], want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (40, 256)])
def test_rms_norm_equals_its_reference(shape: tuple[int, int]) -> None:
    x, weight = normal(0, *shape), normal(1, shape[-1])
    close(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    close(rms_norm(torch.zeros(shape), weight, 1e-6), torch.zeros(shape))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (40, 256)])
def test_the_sum_and_its_norm_equal_their_reference(shape: tuple[int, int]) -> None:
    x, delta, weight = normal(0, *shape), normal(1, *shape), normal(2, shape[-1])
    total = x + delta
    close(add_rms_norm(x, delta, weight, 1e-6), reference.rms_norm(total, weight, 1e-6))
    assert torch.equal(x, total)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("num_tokens", "num_q_heads", "num_kv_heads", "head_dim"),
    [(1, 1, 1, 2), (5, 4, 2, 6), (33, 4, 1, 128), (3, 2, 0, 64)],
)
def test_norm_rotation_and_kv_write_equal_their_reference(
    num_tokens: int, num_q_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    angles = normal(1, num_tokens, head_dim // 2).repeat(1, 2)
    signed_sin = angles.sin()
    signed_sin[..., : head_dim // 2] *= -1
    rotations = torch.stack([angles.cos(), signed_sin], dim=1)
    heads = normal(0, num_tokens, num_q_heads + 2 * num_kv_heads, head_dim)
    norms = normal(2, num_q_heads + num_kv_heads, head_dim)
    pool = normal(3, 2 * num_kv_heads, 20, 4, head_dim) if num_kv_heads else None
    cells = torch.randperm(80)[:num_tokens] if num_kv_heads else None
    want, want_pool = heads.clone(), None if pool is None else pool.clone()

    qk_norm_rope_store(heads, norms, 1e-6, rotations, pool, cells)

    reference.qk_norm_rope_store(want, norms, 1e-6, rotations, want_pool, cells)
    close(heads, want)
    if pool is not None and want_pool is not None:
        close(pool, want_pool)


@pytest.mark.usefixtures("kernels")
def test_kv_is_rounded_to_the_nearest_bf16() -> None:
    heads = normal(0, 50, 5, 64)
    heads[0, 3:, :3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.inf])  # halfway down, halfway up
    rotations = torch.tensor([1.0, 0.0])[:, None].expand(50, 2, 64).contiguous()
    pool = torch.zeros(4, 20, 4, 64, dtype=torch.bfloat16)
    cells = torch.randperm(80)[:50]

    qk_norm_rope_store(heads, torch.ones(3, 64), 1e-6, rotations, pool, cells)

    assert torch.equal(pool.flatten(1, 2)[:, cells].transpose(0, 1), heads[:, 1:].bfloat16())


@pytest.mark.parametrize("shape", [(1, 2), (5, 14), (3, 256)])
def test_swiglu_equals_its_reference(shape: tuple[int, int]) -> None:
    x = normal(0, *shape)
    close(swiglu(x), reference.swiglu(x))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("is_normalized", [True, False], ids=["of the chosen", "of all"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 1, 1), (7, 5, 2), (33, 128, 8)])
def test_expert_choice_equals_its_reference(is_normalized: bool, num_tokens: int, num_experts: int, top_k: int) -> None:
    logits = normal(0, num_tokens, num_experts)
    ids, weights = choose_experts(logits, top_k, is_normalized=is_normalized)
    want_ids, want_weights = reference.choose_experts(logits, top_k, is_normalized=is_normalized)
    assert torch.equal(ids, want_ids)
    close(weights, want_weights)


@pytest.mark.usefixtures("compiled")
def test_of_equal_experts_the_first_are_chosen() -> None:
    ids, _ = choose_experts(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]), 4, is_normalized=True)
    assert ids.tolist() == [[1, 2, 4, 0]]


@pytest.mark.parametrize("num_tokens", [1, 2, 19])
@pytest.mark.parametrize(("first", "num_local"), [(0, 5), (0, 2), (2, 3), (4, 1)])
def test_experts_equal_their_reference_on_any_part_of_them(num_tokens: int, first: int, num_local: int) -> None:
    hidden, ffn, top_k = 24, 10, 2
    ids, weights = choose_experts(normal(0, num_tokens, 5), top_k, is_normalized=False)
    x, gate_up = normal(1, num_tokens, hidden), normal(2, num_local, 2 * ffn, hidden)
    down = normal(3, num_local, hidden, ffn)
    got = apply_experts(x, ids, weights, gate_up, down, first)
    close(got, reference.apply_experts(x, ids, weights, gate_up, down, first))


@pytest.mark.usefixtures("compiled")
@EVERY_KIND
@pytest.mark.parametrize("num_tokens", [1, 2, 19, 300])
@pytest.mark.parametrize(("first", "num_local"), [(0, 5), (2, 3), (4, 1)])
def test_experts_in_panels_equal_their_reference(kind: str, num_tokens: int, first: int, num_local: int) -> None:
    hidden, ffn, top_k, tiling = 150, 70, 2, Tiling(first=128, size=128)
    ids, weights = choose_experts(normal(0, num_tokens, 5), top_k, is_normalized=False)
    x = normal(1, num_tokens, hidden) * 0.01
    gate_up = panel_weight(2, kind, (num_local, 2 * ffn, hidden), tiling, is_paired=True)
    down = panel_weight(3, kind, (num_local, hidden, ffn), tiling, is_paired=False)
    got = apply_experts(x, ids, weights, gate_up, down, first)
    want = reference.apply_experts(as_multiplied(x, gate_up), ids, weights, dense(gate_up), dense(down), first)
    # Between the two products of an expert rows are rounded once more.
    error = 1e-5 if down.products == "fp32" else 4e-3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=error * float(want.abs().max()))


def test_tokens_without_local_experts_add_nothing() -> None:
    ids, weights = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    got = apply_experts(normal(0, 3, 4), ids, weights, normal(1, 2, 6, 4), normal(2, 2, 4, 3), 7)
    assert torch.equal(got, torch.zeros(3, 4))


@pytest.mark.usefixtures("kernels")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 7),
    block_size=st.sampled_from([1, 4, 16]),
    head_dim=st.sampled_from([2, 8, 24, 72, 128]),
    kv_dtype=KV_DTYPES,
    seed=SEEDS,
)
def test_decode_attention_equals_its_reference(
    lengths: list[int],
    num_kv_heads: int,
    group: int,
    block_size: int,
    head_dim: int,
    kv_dtype: torch.dtype,
    seed: int,
) -> None:
    pool = normal(seed, 2 * num_kv_heads, 50, block_size, head_dim).to(kv_dtype)
    q = normal(seed + 1, len(lengths), num_kv_heads * group, head_dim)
    shape, generator = (len(lengths), -(-max(lengths) // block_size)), torch.Generator().manual_seed(seed)
    tables = torch.randint(0, 50, shape, generator=generator)
    keys = PagedKeys(tables, torch.tensor(lengths), max(lengths))
    close(decode_attention(q, pool, keys), reference.decode_attention(q, pool.float(), keys))


def chunk_of(pool: Tensor, table: Tensor, start: int, size: int) -> Tensor:
    """K and V of a chunk's tokens, [size, 2G, D]."""
    positions = torch.arange(start, start + size)
    block_size = pool.shape[2]
    return pool[:, table[positions // block_size], positions % block_size].transpose(0, 1)


@pytest.mark.usefixtures("kernels")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chunks=st.lists(
        st.tuples(st.sampled_from([0, 0, 1, 30, 129, 260]), st.sampled_from([1, 2, 5, 30, 140])), min_size=1, max_size=4
    ),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    block_size=st.sampled_from([1, 4, 16]),
    head_dim=st.sampled_from([2, 8, 24, 72, 128]),
    kv_dtype=KV_DTYPES,
    seed=SEEDS,
)
def test_prefill_attention_equals_its_reference(
    chunks: list[tuple[int, int]],
    num_kv_heads: int,
    group: int,
    block_size: int,
    head_dim: int,
    kv_dtype: torch.dtype,
    seed: int,
) -> None:
    starts, sizes = (np.array(values) for values in zip(*chunks, strict=True))
    pool = normal(seed, 2 * num_kv_heads, 410, block_size, head_dim).to(kv_dtype)
    q = normal(seed + 1, int(sizes.sum()), num_kv_heads * group, head_dim)
    generator = torch.Generator().manual_seed(seed)
    tables = torch.stack([torch.randperm(410, generator=generator)[: -(-400 // block_size)] for _ in chunks])
    kv = torch.cat([chunk_of(pool, table, *chunk) for table, chunk in zip(tables, chunks, strict=True)]).float()
    described = Chunks(tables_CM=tables, starts=starts, sizes=sizes)
    got, want = prefill_attention(q, kv, pool, described), reference.prefill_attention(q, pool.float(), described)
    if kv_dtype == torch.bfloat16 and multiplies_bf16():  # queries and weights are rounded, too
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.03)
    else:
        close(got, want)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [1, 50, 128, 199])
def test_a_token_attends_with_the_same_bits_however_its_prompt_is_cut(cut: int, kv_dtype: torch.dtype) -> None:
    pool, q = normal(0, 4, 30, 16, 64).to(kv_dtype), normal(1, 300, 6, 64)
    table = torch.randperm(30)[None, :19]

    def attend(*ends: int) -> Tensor:
        """The chunks between these positions, in a step each."""
        outs = []
        for start, stop in itertools.pairwise(ends):
            chunk = Chunks(tables_CM=table, starts=np.array([start]), sizes=np.array([stop - start]))
            outs.append(prefill_attention(q[start:stop], chunk_of(pool, table[0], start, stop - start), pool, chunk))
        return torch.cat(outs)

    assert torch.equal(attend(0, cut, 300), attend(0, 300))
