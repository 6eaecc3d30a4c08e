"""What `bench.gpu` times: each GPU kernel on the shapes of the real models, beside its reference and what torch has.

A case has several copies of what it reads, more than a GPU's cache holds, and launches go from one to the next: a
decode step never finds its weights in the cache either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_rivals import grouped_mm, sdpa
from workers.candidates import Candidates
from workers.drawing import draw as draw_in_torch
from workers.drawing import rules_of
from workers.kernels import deep_gemm, deep_gemm_experts, scaled_mm
from workers.kernels import reference as plain
from workers.kernels.prefill_attention import Chunks
from workers.kernels.sums import PartialSums
from workers.kernels.tiles import TILE, TileWeight
from workers.kernels.triton import (
    decode_attention,
    draw,
    experts,
    feed_forward,
    gate,
    gemm,
    norm,
    ordered_sum,
    prefill_attention,
    qk_norm_rope,
    quantize,
    reference,
    route,
    spread,
    swiglu,
)
from workers.kernels.triton.candidates import likeliest

Launch = Callable[[], Any]
CACHE_BYTES = 200 * 2**20
"""Of copies together: several times what an H200's cache holds."""
MAX_COPIES = 24


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel on one shape."""

    name: str
    launches: list[Launch]
    """One for each copy of its inputs."""
    num_bytes: int
    """That must be moved once, whatever the kernel does."""
    flops: int = 0
    is_fp8: bool = False
    error: Callable[[], float] | None = None
    """Largest difference from the reference, measured by its largest value."""
    rivals: dict[str, list[Launch]] = field(default_factory=dict)
    """What else computes the same, one launch for each copy of its inputs."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes; of an H200, or so small that an interpreter takes seconds."""

    weights: dict[str, tuple[int, int]]
    """[out, in] of dense products."""
    decode_rows: tuple[int, ...]
    prefill_rows: int
    hidden: int
    experts: tuple[int, int, int, int, int]
    """Hidden, F of one expert, experts in all, experts here, chosen of a token."""
    expert_tokens: tuple[int, ...]
    attention: tuple[tuple[int, int, int], ...]
    """Sequences, keys of each, queries of a group."""
    chunks: tuple[tuple[int, int], ...]
    """Start and size."""
    head_dim: int
    block_size: int
    vocabulary: int


H200 = Sizes(
    weights={
        "4B qkv": (6144, 2560),
        "4B o": (2560, 4096),
        "4B gate_up": (19456, 2560),
        "4B down": (2560, 9728),
        "235B tp8 qkv": (1280, 4096),
        "235B tp8 o": (4096, 1024),
    },
    decode_rows=(1, 16, 64),
    prefill_rows=4096,
    hidden=4096,
    experts=(4096, 1536, 128, 16, 8),
    expert_tokens=(1, 8, 64, 256, 4096),
    attention=((1, 4096, 8), (64, 4096, 8), (64, 4096, 16), (64, 4096, 4), (16, 32768, 8), (4, 131072, 8)),
    chunks=((0, 2048), (30720, 2048), (129024, 2048)),
    head_dim=128,
    block_size=64,
    vocabulary=151936,
)
TINY = Sizes(
    weights={"tiny": (192, 1024)},
    decode_rows=(1, 3),
    prefill_rows=66,
    hidden=256,
    experts=(256, 128, 4, 2, 2),
    expert_tokens=(1, 5),
    attention=((2, 300, 4),),
    chunks=((0, 5), (40, 7)),
    head_dim=64,
    block_size=16,
    vocabulary=300,
)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Draws what kernels read, on one device."""

    device: torch.device
    dtype: torch.dtype
    """Of activations."""
    cache_bytes: int
    """Copies together take so many."""

    @classmethod
    def on(cls, device: torch.device) -> Inputs:
        """To be computed with: of one copy on a CPU, where times mean nothing and fp32 alone is exact."""
        if device.type == "cuda":
            return cls(device=device, dtype=torch.bfloat16, cache_bytes=CACHE_BYTES)
        return cls(device=device, dtype=torch.float32, cache_bytes=0)

    @classmethod
    def for_build(cls) -> Inputs:
        """To be compiled for: as on a GPU, and one copy."""
        return cls(device=torch.device("cpu"), dtype=torch.bfloat16, cache_bytes=0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def integers(self, stop: int, *shape: int) -> Tensor:
        return torch.randint(0, stop, shape, device=self.device)

    def tiles(self, *shape: int) -> TileWeight:
        """Codes of every size but NaN; of both signs."""
        codes = torch.randint(0, 0x7F, shape, device=self.device, dtype=torch.uint8)
        codes |= torch.randint(0, 2, shape, device=self.device, dtype=torch.uint8) << 7
        scale_shape = (*shape[:-2], -(-shape[-2] // TILE), shape[-1] // TILE)
        scale = torch.rand(scale_shape, device=self.device) * 1e-3 + 1e-4
        return TileWeight(codes.view(torch.float8_e4m3fn), scale, shape[-2])

    def copies(self, num_bytes: int) -> range:
        return range(min(MAX_COPIES, max(1, -(-self.cache_bytes // num_bytes))))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def cases(sizes: Sizes, inputs: Inputs) -> Iterator[Case]:
    """One after another, each with the memory that it needs."""
    yield from _dense(sizes, inputs)
    yield from _experts(sizes, inputs)
    yield from _attention(sizes, inputs)
    yield from _chunks(sizes, inputs)
    yield from _rows(sizes, inputs)
    yield from _choices(sizes, inputs)


def _dense(sizes: Sizes, inputs: Inputs) -> Iterator[Case]:
    for name, (size_out, size_in) in sizes.weights.items():
        weights = [inputs.tiles(size_out, size_in) for _ in inputs.copies(size_out * size_in)]
        floats = [weight.dense().to(inputs.dtype) for weight in weights]
        for num_rows in (*sizes.decode_rows, sizes.prefill_rows):
            x = inputs.normal(num_rows, size_in)
            rows = quantize.quantize(x)
            rivals: dict[str, list[Launch]] = {"torch, unpacked": [lambda x=x, w=w: torch.mm(x, w.t()) for w in floats]}
            if deep_gemm.library_for(rows, weights[0]) is not None or scaled_mm.is_chosen(rows, weights[0]):
                rivals["mull's own"] = [lambda x=rows, w=w: gemm.own_product(x, w) for w in weights]
            if inputs.device.type == "cuda":
                rivals["torch scaled_mm"] = [lambda x=rows, w=w: scaled_mm.linear(x, w) for w in weights]
            yield Case(
                name=f"product {name} {size_out}x{size_in}, {num_rows} rows",
                launches=[lambda x=rows, w=w: gemm.linear(x, w) for w in weights],
                num_bytes=weights[0].nbytes + num_rows * (size_in + size_out * inputs.dtype.itemsize),
                flops=2 * num_rows * size_out * size_in,
                is_fp8=True,
                error=lambda x=rows, w=weights[0]: error(gemm.linear(x, w), reference.linear(x, w)),
                rivals=rivals,
            )


def _experts(sizes: Sizes, inputs: Inputs) -> Iterator[Case]:
    hidden, ffn, total, here, top_k = sizes.experts
    layer_bytes = here * 3 * hidden * ffn
    layers = [
        (inputs.tiles(here, 2 * ffn, hidden), inputs.tiles(here, hidden, ffn)) for _ in inputs.copies(layer_bytes)
    ]
    for num_tokens in sizes.expert_tokens:
        for law in ("uniform", "Zipf"):
            scores = torch.rand(num_tokens, total, device=inputs.device)
            if law == "Zipf":  # exponential clocks: the k first, drawn by weight 1 / rank, without replacement
                scores = scores.log() * torch.arange(1, total + 1, device=inputs.device)
            slots, x = scores.topk(top_k).indices, inputs.normal(num_tokens, hidden)
            weights = torch.rand(num_tokens, top_k, device=inputs.device).to(inputs.dtype)
            rivals = grouped_mm(x, slots, layers[0]) if inputs.device.type == "cuda" else {}
            if deep_gemm_experts.library_for(x, *layers[0]) is not None:
                rivals["mull's own"] = [
                    lambda x=x, s=slots, w=weights, gu=gu, d=d: experts.own_experts(x, s, w, gu, d, 0)
                    for gu, d in layers
                ]
            used, pairs = len(slots[slots < here].unique()), int((slots < here).sum())
            yield Case(
                name=f"experts {here} of {total} ({hidden}, {ffn}), {num_tokens} tokens, {law}",
                launches=[
                    lambda x=x, s=slots, w=weights, gu=gu, d=d: experts.apply_experts(x, s, w, gu, d, 0)
                    for gu, d in layers
                ],
                num_bytes=used * 3 * hidden * ffn + 2 * num_tokens * hidden * inputs.dtype.itemsize,
                flops=6 * pairs * hidden * ffn,
                is_fp8=True,
                error=lambda x=x, s=slots, w=weights: (
                    error(
                        experts.apply_experts(x, s, w, *layers[0], 0), reference.apply_experts(x, s, w, *layers[0], 0)
                    )
                    if int((s < here).sum())
                    else 0.0
                ),
                rivals=rivals,
            )


def _attention(sizes: Sizes, inputs: Inputs) -> Iterator[Case]:
    for num_seqs, num_keys, group in sizes.attention:
        blocks = -(-num_keys // sizes.block_size)
        for kv in (inputs.dtype, torch.float8_e4m3fn):
            one = num_seqs * blocks * sizes.block_size * 2 * sizes.head_dim * kv.itemsize
            pools = [
                inputs.normal(2, num_seqs * blocks, sizes.block_size, sizes.head_dim).to(kv) for _ in inputs.copies(one)
            ]
            tables = torch.randperm(num_seqs * blocks, device=inputs.device).view(num_seqs, blocks)
            q, lengths = inputs.normal(num_seqs, group, sizes.head_dim), torch.full((num_seqs,), num_keys)
            lengths = lengths.to(inputs.device)
            arguments = (tables, lengths, num_keys)
            yield Case(
                name=f"decode attention {num_seqs} x {num_keys} keys, group {group}, {str(kv).split('.')[1]}",
                launches=[lambda q=q, p=p, a=arguments: decode_attention.decode_attention(q, p, *a) for p in pools],
                num_bytes=2 * num_seqs * num_keys * sizes.head_dim * kv.itemsize,
                flops=4 * num_seqs * num_keys * group * sizes.head_dim,
                rivals={} if kv != inputs.dtype else {"torch sdpa, no pages": [sdpa(q, p, num_keys) for p in pools]},
                error=lambda q=q, p=pools[0], a=arguments: error(
                    decode_attention.decode_attention(q, p, *a), reference.decode_attention(q, p, *a[:2])
                ),
            )
            if sizes.head_dim == TILE and kv == inputs.dtype:
                yield Case(
                    name=f"decode attention {num_seqs} x {num_keys} keys, group {group}, to FP8 rows",
                    launches=[
                        lambda q=q, p=p, a=arguments: decode_attention.decode_attention_quantize(q, p, *a)
                        for p in pools
                    ],
                    num_bytes=2 * num_seqs * num_keys * sizes.head_dim * kv.itemsize,
                )


def _chunks(sizes: Sizes, inputs: Inputs) -> Iterator[Case]:
    group = 8
    for start, size in sizes.chunks:
        blocks = -(-(start + size) // sizes.block_size)
        pool = inputs.normal(2, blocks, sizes.block_size, sizes.head_dim)
        q = inputs.normal(size, group, sizes.head_dim)
        tables = torch.randperm(blocks, device=inputs.device).view(1, blocks)
        chunks = Chunks(tables_CM=tables, starts=np.array([start]), sizes=np.array([size]))
        arguments = (chunks.tables_CM, chunks.bounds_3C, [size])
        rivals: dict[str, list[Launch]] = {}
        if start == 0:
            k, v = inputs.normal(2, 1, size, sizes.head_dim)
            rivals["torch sdpa"] = [
                lambda q=q, k=k, v=v: F.scaled_dot_product_attention(
                    q.transpose(0, 1)[None], k[None], v[None], is_causal=True, enable_gqa=True
                )
            ]
        small = min(size, 256)  # whose reference does not hold all of a long context's scores
        yield Case(
            name=f"prefill attention of {size} behind {start}, group {group}",
            launches=[lambda q=q, p=pool, a=arguments: prefill_attention.prefill_attention(q, p, *a)],
            num_bytes=2 * (start + size) * sizes.head_dim * inputs.dtype.itemsize,
            flops=4 * group * sizes.head_dim * (size * start + size * (size + 1) // 2),
            error=lambda q=q, p=pool, a=arguments, t=tables, s=start, n=small: error(
                prefill_attention.prefill_attention(q, p, *a)[:n],
                reference.chunk_attention(q[:n], p, t[0][: -(-(s + n) // sizes.block_size)], s),
            ),
            rivals=rivals,
        )


def _rows(sizes: Sizes, inputs: Inputs) -> Iterator[Case]:
    hidden, item = sizes.hidden, inputs.dtype.itemsize
    weight = inputs.normal(hidden)
    for rows in (sizes.decode_rows[-1], sizes.prefill_rows):
        x, delta, wide = inputs.normal(rows, hidden), inputs.normal(rows, hidden), inputs.normal(1, rows, 2 * hidden)
        heads, norms = inputs.normal(rows, 10, sizes.head_dim), inputs.normal(9, sizes.head_dim)
        parts = PartialSums(inputs.normal(7, rows, hidden, dtype=torch.float32), inputs.dtype)
        head_parts = inputs.normal(3, rows, 10 * sizes.head_dim, dtype=torch.float32)
        pool = inputs.normal(2, -(-rows // sizes.block_size), sizes.block_size, sizes.head_dim)
        turns, cells = inputs.normal(rows, 2, sizes.head_dim), torch.arange(rows, device=inputs.device)
        launches: dict[str, tuple[Launch, int, Launch | None]] = {
            "quantise": (lambda x=x: quantize.quantize(x), rows * hidden * (item + 1), None),
            "norm": (
                lambda x=x: norm.rms_norm(x, weight, 1e-6),
                2 * rows * hidden * item,
                lambda x=x: F.rms_norm(x, (hidden,), weight, 1e-6),
            ),
            "sum, norm and quantise": (
                lambda x=x, d=delta: norm.add_rms_norm_quantize(x, d, weight, 1e-6),
                rows * hidden * (3 * item + 1),
                None,
            ),
            "sum, norm and quantise for two readers": (
                lambda x=x, d=delta: norm.add_rms_norm_both(x, d, weight, 1e-6),
                rows * hidden * (4 * item + 1),
                None,
            ),
            "sum of 7 parts, norm and quantise": (
                lambda x=x, p=parts: norm.add_rms_norm_quantize(x, p, weight, 1e-6),
                rows * hidden * (7 * 4 + 2 * item + 1),
                None,
            ),
            "activation and quantise": (
                lambda w=wide: swiglu.swiglu_quantize(w, inputs.dtype),
                rows * hidden * (2 * item + 1),
                lambda w=wide: plain.swiglu(w[0]),
            ),
            "norm, rotation and KV write": (
                lambda h=heads, n=norms, r=turns, p=pool, c=cells: qk_norm_rope.qk_norm_rope_store(h, n, 1e-6, r, p, c),
                rows * sizes.head_dim * item * (2 * 9 + 3 + 2),
                None,
            ),
            "sum of 3 parts, norm, rotation and KV write": (
                lambda h=head_parts, n=norms, r=turns, p=pool, c=cells: qk_norm_rope.sum_norm_rope_store(
                    h, inputs.dtype, n, 1e-6, r, p, c
                ),
                rows * sizes.head_dim * (3 * 10 * 4 + item * (10 + 2 + 2)),
                None,
            ),
        }
        for name, (launch, num_bytes, rival) in launches.items():
            rivals = {} if rival is None else {"torch": [rival]}
            yield Case(name=f"{name}, {rows} rows", launches=[launch], num_bytes=num_bytes, rivals=rivals)


def _choices(sizes: Sizes, inputs: Inputs) -> Iterator[Case]:
    _, _, total, here, top_k = sizes.experts
    rows = sizes.decode_rows[-1]
    logits, slots = inputs.normal(rows, total), inputs.integers(total, rows, top_k)
    yield Case(
        name=f"gate, {rows} rows of {total}",
        launches=[lambda: gate.choose_experts(logits, top_k, is_normalized=True)],
        num_bytes=logits.nbytes,
        rivals={"torch": [lambda: torch.softmax(logits, -1).topk(top_k)]},
    )
    yield Case(
        name=f"routes of {rows} rows to {here} experts",
        launches=[lambda: route.route(slots, 0, here)],
        num_bytes=slots.nbytes,
        rivals={"torch sort": [lambda: slots.flatten().sort(stable=True)]},
    )
    routes, rows_of = route.route(slots, 0, here), quantize.quantize(inputs.normal(rows, sizes.hidden))
    layout = spread.Layout(
        torch.arange(0, here * rows, rows, dtype=torch.int32, device=inputs.device), here * rows, rows
    )
    yield Case(
        name=f"rows of {rows} tokens put where {here} experts want them",
        launches=[lambda: spread.spread(rows_of, slots, 0, routes, layout)],
        num_bytes=2 * int((slots < here).sum()) * sizes.hidden,
    )
    parts, total_n = inputs.normal(8, rows * sizes.hidden), inputs.normal(rows * sizes.hidden)
    yield Case(
        name=f"sum of 8 ranks' parts of {rows} x {sizes.hidden}, in order",
        launches=[lambda: ordered_sum.sum_in_order(parts, total_n)],
        num_bytes=parts.nbytes + total_n.nbytes,
        rivals={"torch sum": [lambda: parts.sum(0)]},
    )
    vocabulary = inputs.normal(rows, sizes.vocabulary, dtype=torch.float32)
    for count in (1, 20, 64):
        yield Case(
            name=f"{count} candidates of {rows} x {sizes.vocabulary}",
            launches=[lambda count=count: likeliest(vocabulary, count)],
            num_bytes=vocabulary.nbytes,
            rivals={"torch topk": [lambda count=count: vocabulary.topk(count)]},
        )
    offered, row_rules = likeliest(vocabulary, 32), torch.zeros(rows, 5, dtype=torch.int64, device=inputs.device)
    yield Case(
        name=f"draw of {rows} rows from 32 candidates",
        launches=[lambda: draw.draw(*offered, row_rules)],
        num_bytes=rows * (32 * 12 + 5 * 8 + 2 * 8),
        rivals={"torch": [lambda: draw_in_torch(Candidates(*offered), rules_of(row_rules))]},
    )
    x, gate_up = inputs.normal(1, sizes.hidden), inputs.tiles(2 * sizes.hidden, sizes.hidden)
    down = inputs.tiles(sizes.hidden, sizes.hidden)
    yield Case(
        name=f"feed-forward of one row, {sizes.hidden} to {sizes.hidden}",
        launches=[lambda: feed_forward.feed_forward(x, gate_up, down)],
        num_bytes=gate_up.nbytes + down.nbytes,
        is_fp8=True,
    )
