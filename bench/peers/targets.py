"""What we have promised ourselves to reach beside the peers, and whether this run reached it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from bench.peers.registry import F32, IN_PROCESS, MULL_GRPC, PEERS, Q8_0, VLLM_BF16, VLLM_FP32
from bench.peers.results import CellResult, ShapeResult, Value, throughput, tpot, ttft
from bench.peers.work import Work

TTFT_PROMPT = 1024
PROCESS_MB = 300.0


@dataclass(frozen=True)
class Target:
    """One promise; `reached` None: this run has not what it takes to say."""

    shape: str
    engine: str
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
    found: list[Target] = []
    for ours in IN_PROCESS:
        judge = _Judge(result, work, ours)
        found += judge.pocket() if result.shape == "pocket" else (*judge.decode(), *judge.aggregate())
        found += judge.first_token()
        found += judge.memory()
    return [*found, *_Judge(result, work, MULL_GRPC).memory()]


@dataclass(frozen=True)
class _Judge:
    """Of one engine of ours."""

    result: ShapeResult
    work: Work
    ours: str

    def pocket(self) -> Iterator[Target]:
        for bound, streams, names in (
            (1.0, 32, (Q8_0, F32)),
            (1.5, 32, (VLLM_FP32, VLLM_BF16)),
            (4.0, 1, (VLLM_FP32, VLLM_BF16)),
        ):
            for cell in self.result.decoding(streams):
                peer, reached = self._against_best(cell, names, throughput)
                yield self._at_least(bound, f"throughput at {cell.cell}", reached, peer)

    def decode(self) -> Iterator[Target]:
        for cell in self.result.decoding(1):
            ratio = cell.ratio(Q8_0, self.ours, tpot)
            what = f"ms a token at {cell.cell}"
            yield self._at_least(1.5, what, None if ratio is None else ratio.median, Q8_0)
            own = cell.spread(self.ours, tpot)
            length = cell.cell.prompt + cell.cell.tokens_out / 2
            num_bytes = self.work.read_bytes + length * self.work.kv_bytes_per_token
            floor_s = num_bytes / (cell.read_gb_per_s * 1e9)
            yield self._at_least(0.7, what, None if own is None else floor_s / own.median, "read bandwidth")

    def aggregate(self) -> Iterator[Target]:
        for streams in (8, 16, 32):
            for cell in self.result.decoding(streams):
                peer, reached = self._against_best(cell, PEERS, throughput)
                yield self._at_least(1.3, f"throughput at {cell.cell}", reached, peer)

    def first_token(self) -> Iterator[Target]:
        for cell in self.result.first_tokens(TTFT_PROMPT):
            what = f"first token of {TTFT_PROMPT}"
            ratios = {peer: cell.ratio(self.ours, peer, ttft) for peer in PEERS}
            known = {peer: ratio.median for peer, ratio in ratios.items() if ratio is not None}
            peer = max(known, key=lambda name: known[name], default="")
            yield self._at_most(1.0, what, known.get(peer), peer)
            own = cell.spread(self.ours, ttft)
            limit_s = 2 * self.work.multiplied * TTFT_PROMPT / (cell.fp32_gflop_per_s * 1e9)
            yield self._at_most(1.3, what, None if own is None else own.median / limit_s, "fp32 GEMM limit")

    def memory(self) -> Iterator[Target]:
        """The process that has weights and KV, as a share of 1.2 × both and a part for all else."""
        kv_tokens = max((cell.cell.streams * cell.cell.length for cell in self.result.cells), default=0)
        kv_bytes = kv_tokens * self.work.kv_bytes_per_token
        allowed_mb = 1.2 * (self.work.weight_bytes + kv_bytes) / 1e6 + PROCESS_MB
        if memory := self.result.memory.get(self.ours):
            yield self._at_most(1.0, "memory", memory.largest_process_mb / allowed_mb, f"{allowed_mb:,.0f} MB")

    def _at_least(self, bound: float, what: str, reached: float | None, against: str) -> Target:
        return Target(self.result.shape, self.ours, what, bound, True, reached, against)

    def _at_most(self, bound: float, what: str, reached: float | None, against: str) -> Target:
        return Target(self.result.shape, self.ours, what, bound, False, reached, against)

    def _against_best(
        self, cell: CellResult, peers: tuple[str, ...] | list[str], value: Value
    ) -> tuple[str, float | None]:
        """The peer that we do worst against, and our ratio to it."""
        ratios = {peer: cell.ratio(self.ours, peer, value) for peer in peers}
        known: Mapping[str, float] = {peer: ratio.median for peer, ratio in ratios.items() if ratio is not None}
        best = min(known, key=lambda name: known[name], default="")
        return best, known.get(best)
