"""Which candidates are worth simulating: a quick estimate of the step time that a load settles at."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.cost import CostModel
from cluster.planner.layouts import Candidate, Fit
from cluster.planner.step_shape import GroupShape, chunk_pairs
from cluster.planner.workload import Lengths

_ROUNDS = 40
_FULL = 0.95
"""Share of the time that prefills may take before decodes starve."""


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A load on a candidate, by Little's law."""

    token_s: float
    """Time of a token, prefills of others included."""
    prefill_s: float
    """Of a prompt that has the ranks for itself."""
    streams: float
    """Under way at once, over all copies."""
    tokens_per_s: float
    """Of output, that it gives of what is asked for."""
    fits: bool
    """Slots and KV hold them, and steps keep up."""

    def answer_s(self, lengths: Lengths) -> float:
        """Until its answer begins."""
        return self.prefill_s + (lengths.thinking + 1) * self.token_s

    def life_s(self, lengths: Lengths) -> float:
        """Of a request that waits for nobody; a second, at the least."""
        return max(1.0, self.prefill_s + (lengths.thinking + lengths.answer) * self.token_s)


def settle(fit: Fit, cost: CostModel, rate_per_s: float, lengths: Lengths) -> Settled:
    """Streams are rate × output × time of a token; the time of a token depends on the streams."""
    candidate, limits = fit.candidate, fit.limits
    output = lengths.thinking + lengths.answer
    most = fit.most_streams(lengths.mean_held)
    chunk = min(lengths.prompt, limits.max_num_batched_tokens)
    chunks = max(1.0, lengths.prompt / limits.max_num_batched_tokens)
    alone_s, beside_s = (chunks * seconds for seconds in _chunk_s(candidate, cost, chunk))
    streams = 1.0
    token_s, prefill_s, prefill_share = 0.0, alone_s, 0.0
    for _ in range(_ROUNDS):
        step_s = cost.step(_decodes(candidate, min(streams, most), lengths.mean_held)).total_s
        # The busier groups are with prompts, the more have one in the same step.
        prefill_s = alone_s + prefill_share * (beside_s - alone_s)
        # No more prompts begin than streams end: each takes as many steps as its output has tokens.
        each_s = most / candidate.copies * prefill_s / output
        prefill_share = min(_FULL, rate_per_s / candidate.copies * prefill_s, each_s / (step_s + each_s))
        token_s = step_s / (1 - prefill_share)
        streams = (streams + rate_per_s * output * token_s) / 2
    return Settled(
        token_s=token_s,
        prefill_s=alone_s,
        streams=streams,
        tokens_per_s=min(streams, most) / token_s,
        fits=streams <= most and prefill_share < _FULL,
    )


def _chunk_s(candidate: Candidate, cost: CostModel, size: int) -> tuple[float, float]:
    """What a chunk of a prompt adds to a step: alone in it, and with one in every group.

    It shares its step with the decodes: what it takes beyond the step's own overhead.
    """
    groups = candidate.layout.dp
    chunk = GroupShape(prefill_tokens=size, prefill_pairs=chunk_pairs(0, size), num_prefills=1)
    idle = [GroupShape()] * (groups - 1)
    plain_s = cost.step([GroupShape(1, 1), *idle]).total_s
    alone_s = max(0.0, cost.step([chunk, *idle]).total_s - plain_s)
    return alone_s, max(0.0, cost.step([chunk] * groups).total_s - plain_s) / groups


def _decodes(candidate: Candidate, streams: float, context: int) -> list[GroupShape]:
    groups = candidate.layout.dp
    each = max(1, round(streams / candidate.copies / groups))
    return [GroupShape(num_decodes=each, decode_context=each * context)] * groups
