"""What we have promised ourselves to reach beside the peers, and whether this run reached it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from bench.peers.registry import F32, MULL, MULL_GRPC, PEERS, Q8_0, VLLM_BF16, VLLM_FP32
from bench.peers.results import CellResult, ShapeResult, Value, throughput, tpot, ttft
from bench.peers.work import Work

TTFT_PROMPT = 1024
PROCESS_MB = 300.0


@dataclass(frozen=True)
class Target:
    """One promise; `reached` None: this run has not what it takes to say."""

    shape: str
    what: str
    bound: float
    at_least: bool
    reached: float | None
    against: str = ""

    @property
    def met(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached >= self.bound if self.at_least else self.reached <= self.bound


def targets(result: ShapeResult, work: Work) -> list[Target]:
    """All that apply to the shape, for the engine in process, as the peers are; memory for the server, too.

    Each names the load it was judged at: streams × prompt + tokens out.
    """
    result = replace(result, cells=[cell for cell in result.cells if cell.limits])
    found = [*_pocket(result)] if result.shape == "pocket" else [*_decode(result, work), *_aggregate(result)]
    return [*found, *_first_token(result, work), *_memory(result, work)]


def _pocket(result: ShapeResult) -> Iterator[Target]:
    for bound, streams, names in (
        (1.0, 32, (Q8_0, F32)),
        (1.5, 32, (VLLM_FP32, VLLM_BF16)),
        (4.0, 1, (VLLM_FP32, VLLM_BF16)),
    ):
        for cell in result.decoding(streams):
            peer, reached = _against_best(cell, names, throughput)
            yield Target(result.shape, f"throughput at {cell.cell}", bound, True, reached, peer)


def _decode(result: ShapeResult, work: Work) -> Iterator[Target]:
    for cell in result.decoding(1):
        ratio = cell.ratio(Q8_0, MULL, tpot)
        what = f"ms a token at {cell.cell}"
        yield Target(result.shape, what, 1.5, True, None if ratio is None else ratio.median, Q8_0)
        ours = cell.spread(MULL, tpot)
        length = cell.cell.prompt + cell.cell.tokens_out / 2
        floor_s = (work.read_bytes + length * work.kv_bytes_per_token) / (cell.read_gb_per_s * 1e9)
        yield Target(result.shape, what, 0.7, True, None if ours is None else floor_s / ours.median, "read bandwidth")


def _aggregate(result: ShapeResult) -> Iterator[Target]:
    for streams in (8, 16, 32):
        for cell in result.decoding(streams):
            peer, reached = _against_best(cell, PEERS, throughput)
            yield Target(result.shape, f"throughput at {cell.cell}", 1.3, True, reached, peer)


def _first_token(result: ShapeResult, work: Work) -> Iterator[Target]:
    for cell in result.first_tokens(TTFT_PROMPT):
        what = f"first token of {TTFT_PROMPT}"
        ratios = {peer: cell.ratio(MULL, peer, ttft) for peer in PEERS}
        known = {peer: ratio.median for peer, ratio in ratios.items() if ratio is not None}
        peer = max(known, key=lambda name: known[name], default="")
        yield Target(result.shape, what, 1.0, False, known.get(peer), peer)
        ours = cell.spread(MULL, ttft)
        limit_s = 2 * work.multiplied * TTFT_PROMPT / (cell.fp32_gflop_per_s * 1e9)
        yield Target(result.shape, what, 1.3, False, None if ours is None else ours.median / limit_s, "fp32 GEMM limit")


def _memory(result: ShapeResult, work: Work) -> Iterator[Target]:
    """The process that has weights and KV, as a share of 1.2 × both and a part for all else."""
    kv_tokens = max((cell.cell.streams * cell.cell.length for cell in result.cells), default=0)
    kv_bytes = kv_tokens * work.kv_bytes_per_token
    allowed_mb = 1.2 * (work.weight_bytes + kv_bytes) / 1e6 + PROCESS_MB
    for name in (MULL, MULL_GRPC):
        if memory := result.memory.get(name):
            reached = memory.largest_process_mb / allowed_mb
            yield Target(result.shape, f"memory of {name}", 1.0, False, reached, f"{allowed_mb:,.0f} MB")


def _against_best(cell: CellResult, peers: tuple[str, ...] | list[str], value: Value) -> tuple[str, float | None]:
    """The peer that we do worst against, and our ratio to it."""
    ratios = {peer: cell.ratio(MULL, peer, value) for peer in peers}
    known: Mapping[str, float] = {peer: ratio.median for peer, ratio in ratios.items() if ratio is not None}
    best = min(known, key=lambda name: known[name], default="")
    return best, known.get(best)
