"""Which layouts so many ranks can have, and whether a model fits in each: weights, KV and workspace of a rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cluster.planner.devices import Device
from cluster.planner.rank_work import RankWork, rank_work
from workers.buckets import decode_sizes
from workers.config import ModelConfig, RunnerConfig
from workers.errors import LayoutError
from workers.kv_memory import default_kv_bytes
from workers.layout import ParallelLayout
from workers.step_memory import step_bytes

BLOCK_SIZE = 32
MAX_RANKS = 64
"""Of a copy."""
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to use the ranks: so many copies of a layout."""

    layout: ParallelLayout
    copies: int

    def __str__(self) -> str:
        return f"{self.copies} × {self.layout}" if self.copies > 1 else str(self.layout)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a copy's scheduler is told."""

    max_num_seqs: int
    max_num_batched_tokens: int
    context: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A candidate, measured against the memory of its ranks."""

    candidate: Candidate
    problem: str | None
    """Why it cannot be; None: it can."""
    limits: Limits
    work: RankWork | None = None
    """None where the model cannot be split so."""
    workspace_bytes: int = 0
    kv_bytes: int = 0
    """Of a rank."""
    num_blocks: int = 0
    """Of an attention group."""

    @property
    def group_kv_tokens(self) -> int:
        return self.num_blocks * BLOCK_SIZE

    @property
    def kv_tokens(self) -> int:
        """Of all copies."""
        return self.group_kv_tokens * self.candidate.layout.dp * self.candidate.copies

    @property
    def longest_context(self) -> int:
        """Of one request: what the model was made for, or the whole pool of a group."""
        return min(self.limits.context, self.group_kv_tokens)

    def most_streams(self, tokens_each: int) -> int:
        """That run at once, over all copies, each holding so many tokens."""
        each_group = min(self.limits.max_num_seqs, self.group_kv_tokens // max(1, tokens_each))
        return each_group * self.candidate.layout.dp * self.candidate.copies


def candidates(model: ModelConfig, num_ranks: int) -> list[Candidate]:
    """All ways to use exactly so many ranks, at most 64 a copy.

    Groups (dp) only where experts join them: elsewhere copies do as well.
    """
    found = []
    for world in (size for size in range(1, min(num_ranks, MAX_RANKS) + 1) if num_ranks % size == 0):
        for tp in (size for size in range(1, world + 1) if world % size == 0):
            dp = world // tp
            if dp > 1 and not model.has_moe_layers:
                continue
            sizes = [size for size in range(1, world + 1) if world % size == 0] if model.has_moe_layers else [1]
            for expert_tp in sizes:
                layout = ParallelLayout(tp=tp, dp=dp, expert_tp=expert_tp)
                found.append(Candidate(layout=layout, copies=num_ranks // world))
    return sorted(found, key=lambda one: (one.copies, one.layout.dp, one.layout.expert_tp, one.layout.tp))


def fit(model: ModelConfig, candidate: Candidate, device: Device, limits: Limits, redundant_experts: int = 0) -> Fit:
    """Whether it fits, and what is left for KV: the runner's own rule for it."""
    layout = candidate.layout
    try:
        layout.check(model)
    except LayoutError as error:
        return Fit(candidate=candidate, problem=_reason(error), limits=limits)
    work = rank_work(model, layout, redundant_experts=redundant_experts, kv_itemsize=device.kv_itemsize)
    workspace = 0 if device.kind == "cpu" else workspace_bytes(model, layout, limits, redundant_experts)
    free = device.memory_bytes - work.weight_bytes
    kv = max(0, default_kv_bytes(free, device.kind, workspace))
    num_blocks = min(kv // (work.kv_token_bytes * BLOCK_SIZE), limits.max_num_seqs * -(-limits.context // BLOCK_SIZE))
    problem = _problem(work, workspace, free, num_blocks, limits, device)
    return Fit(
        candidate=candidate,
        problem=problem,
        limits=limits,
        work=work,
        workspace_bytes=workspace,
        kv_bytes=num_blocks * work.kv_token_bytes * BLOCK_SIZE,
        num_blocks=num_blocks,
    )


def workspace_bytes(model: ModelConfig, layout: ParallelLayout, limits: Limits, redundant_experts: int) -> int:
    """What a GPU's steps hold beside weights and KV, by the runner's own count."""
    config = RunnerConfig(
        model_dir="",
        layout=layout,
        redundant_experts=redundant_experts,
        max_model_len=limits.context,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
    )
    return step_bytes(model, config, decode_sizes(model, layout, limits.max_num_seqs, limits.context))


def _problem(work: RankWork, workspace: int, free: int, num_blocks: int, limits: Limits, device: Device) -> str | None:
    if free <= 0:
        return f"weights are {work.weight_bytes / _GB:.1f} GB a rank, a device has {device.memory_bytes / _GB:.1f}"
    if num_blocks * BLOCK_SIZE < limits.context:
        return (
            f"KV has room for {num_blocks * BLOCK_SIZE:,} tokens a group, a context is {limits.context:,}; weights are "
            f"{work.weight_bytes / _GB:.1f} GB a rank, steps take {workspace / _GB:.1f}"
        )
    return None


def _reason(error: LayoutError) -> str:
    return str(error).partition(": ")[2].partition(";")[0]
