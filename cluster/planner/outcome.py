"""The figures of a simulated load: what users feel, what the ranks do, what it costs, what limits it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.planner.flights import Flight, Gaps, Work
from cluster.planner.roofline import StepTime

_FULL_KV = 0.85
_BUSY = 0.98
_GROWTH = 0.1
"""Share of arrivals: more of them waiting at the end than at the start is no chance."""


@dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Of a time, in seconds."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quantiles | None:
        """None where there is none."""
        known = sorted(values)
        if not known:
            return None
        return cls(p50=_at(known, 0.5), p95=_at(known, 0.95), p99=_at(known, 0.99))


def _at(known: Sequence[float], share: float) -> float:
    return known[min(len(known) - 1, int(share * len(known)))]


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the copies did between two moments."""

    seconds: float
    busy_s: float
    """Over all copies."""
    num_copies: float
    output_tokens: int
    prefill_tokens: int
    num_steps: int
    num_decided_steps: int
    kv_share: float
    """Of blocks, while ranks were busy."""
    preemptions: int
    parts: StepTime
    gaps: Gaps
    waiting_at_start: int
    waiting_at_end: int
    running_at_end: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Figures of the requests that came in the measured window, and of the copies in it."""

    requests: int
    refused: int
    unfinished: int
    ttft: Quantiles | None
    time_to_answer: Quantiles | None
    """To the first token of the answer."""
    tpot: Quantiles | None
    """Mean time of a token behind a request's first."""
    inter_token_p99_s: float | None
    output_tokens_per_s: float
    answer_tokens_per_s: float
    utilisation: float
    """Share of the time in which ranks had a step."""
    mean_running: float
    kv_use: float
    preemptions: int
    gpu_hours_per_million_answer_tokens: float | None
    limit: str
    keeps_up: bool
    """No queue grows and nobody is refused."""
    num_steps: int
    num_decided_steps: int
    mean_step: StepTime
    """Where the time of a step goes."""

    def of_more(self, times: float) -> Outcome:
        """Of so many times the copies and the load."""
        return replace(
            self,
            output_tokens_per_s=times * self.output_tokens_per_s,
            answer_tokens_per_s=times * self.answer_tokens_per_s,
            mean_running=times * self.mean_running,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"mean_step": self.mean_step._asdict()}


def judge(flights: Sequence[Flight], window: Window, *, num_gpus: int, answer_share: float, slots: int) -> Outcome:
    """`answer_share`: of output tokens; `slots`: of all copies."""
    ended = [flight for flight in flights if flight.end_s is not None]
    refused = sum(flight.was_refused for flight in flights)
    output_rate = window.output_tokens / window.seconds
    answer_rate = output_rate * answer_share
    keeps_up = not refused and not _grows(window, num_arrivals=len(flights))
    tpot = Quantiles.of(one for flight in ended if (one := flight.tpot_s) is not None)
    mean_step_s = window.busy_s / window.num_steps if window.num_steps else 0.0
    return Outcome(
        requests=len(flights),
        refused=refused,
        unfinished=len(flights) - len(ended) - refused,
        ttft=Quantiles.of(one for flight in flights if (one := flight.ttft_s) is not None),
        time_to_answer=Quantiles.of(one for flight in flights if (one := flight.time_to_answer_s) is not None),
        tpot=tpot,
        inter_token_p99_s=window.gaps.quantile_s(0.99),
        output_tokens_per_s=output_rate,
        answer_tokens_per_s=answer_rate,
        utilisation=window.busy_s / (window.seconds * window.num_copies),
        mean_running=window.output_tokens / window.num_steps * window.num_copies if window.num_steps else 0.0,
        kv_use=window.kv_share,
        preemptions=window.preemptions,
        gpu_hours_per_million_answer_tokens=num_gpus / 3600 / answer_rate * 1e6 if answer_rate else None,
        limit=_limit(window, keeps_up=keeps_up, slots=slots) if mean_step_s else "nothing ran",
        keeps_up=keeps_up,
        num_steps=window.num_steps,
        num_decided_steps=window.num_decided_steps,
        mean_step=StepTime().plus(window.parts, 1 / window.num_steps if window.num_steps else 0.0),
    )


def _grows(window: Window, *, num_arrivals: int) -> bool:
    """Whether the queue does; one that was long to begin with, by a part of what came."""
    least = max(window.running_at_end // 20, 4)
    doubled = window.waiting_at_end > max(2 * window.waiting_at_start, least)
    return doubled or window.waiting_at_end - window.waiting_at_start > max(_GROWTH * num_arrivals, least)


def _limit(window: Window, *, keeps_up: bool, slots: int) -> str:
    """Why it is no faster, in words."""
    if not keeps_up and window.kv_share > _FULL_KV:
        return "KV memory: requests wait for blocks"
    if not keeps_up and window.running_at_end >= _BUSY * slots:
        return "slots: raise max_num_seqs"
    share = max(window.parts) / window.parts.total_s
    return f"{window.parts.limit} ({share:.0%} of a step)"


def between(start: Sequence[Work], end: Sequence[Work]) -> Work:
    """What was done between two moments, over all copies."""
    total = Work()
    for sign, works in ((-1, start), (1, end)):
        for work in works:
            total.busy_s += sign * work.busy_s
            total.num_steps += sign * work.num_steps
            total.num_decided_steps += sign * work.num_decided_steps
            total.decode_tokens += sign * work.decode_tokens
            total.prefill_tokens += sign * work.prefill_tokens
            total.kv_share_s += sign * work.kv_share_s
            total.parts = total.parts.plus(work.parts, sign)
            for bucket, count in work.gaps.counts.items():
                total.gaps.counts[bucket] += sign * count
    return total
