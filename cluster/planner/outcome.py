"""The figures of a simulated load: what users feel, what the ranks do, what it costs, what limits it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.planner.flights import Flight, Gaps, Work
from cluster.planner.roofline import StepTime

_FULL_KV = 0.85
_BUSY = 0.98
_GROWTH = 0.1
"""Share of arrivals: more of them waiting at the end than at the start is no chance."""
_STEPS_WAITED = 3


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

    start_s: float
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
    least_waiting: int
    """At any time that was looked at."""
    running_at_end: int

    @property
    def end_s(self) -> float:
        return self.start_s + self.seconds

    def has(self, time_s: float | None) -> bool:
        """It was in it."""
        return time_s is not None and self.start_s <= time_s <= self.end_s


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Figures of the measured window: of what came, began, was answered and ended in it, and of the copies."""

    requests: int
    """That came."""
    refused: int
    """Of them."""
    unfinished: int
    """Of them, those that were still under way at its end."""
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
    """Streams that get tokens, over time."""
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


def judge(flights: Sequence[Flight], window: Window, *, num_gpus: int, slots: int) -> Outcome:
    """`flights`: all that came, before the window, too; `slots`: of all copies."""
    came = [flight for flight in flights if window.has(flight.arrival.time_s)]
    ended = [flight for flight in flights if window.has(flight.end_s)]
    refused = sum(flight.was_refused for flight in came)
    output_rate = window.output_tokens / window.seconds
    answer_rate = output_rate * _answer_share(ended or came)
    keeps_up = not refused and not _grows(window, num_arrivals=len(came))
    mean_step_s = window.busy_s / window.num_steps if window.num_steps else 0.0
    return Outcome(
        requests=len(came),
        refused=refused,
        unfinished=sum(flight.end_s is None and not flight.was_refused for flight in came),
        ttft=_times(flights, window, _first_token_s),
        time_to_answer=_times(flights, window, _first_answer_s),
        tpot=Quantiles.of(one for flight in ended if (one := flight.tpot_s) is not None),
        inter_token_p99_s=window.gaps.quantile_s(0.99),
        output_tokens_per_s=output_rate,
        answer_tokens_per_s=answer_rate,
        utilisation=min(1.0, window.busy_s / (window.seconds * window.num_copies)),  # a step counts when it ends
        mean_running=sum(_seconds_within(flight, window) for flight in flights) / window.seconds,
        kv_use=window.kv_share,
        preemptions=window.preemptions,
        gpu_hours_per_million_answer_tokens=num_gpus / 3600 / answer_rate * 1e6 if answer_rate else None,
        limit=_limit(window, keeps_up=keeps_up, slots=slots) if mean_step_s else "nothing ran",
        keeps_up=keeps_up,
        num_steps=window.num_steps,
        num_decided_steps=window.num_decided_steps,
        mean_step=StepTime().plus(window.parts, 1 / window.num_steps if window.num_steps else 0.0),
    )


_first_token_s = operator.attrgetter("first_token_s")
_first_answer_s = operator.attrgetter("first_answer_s")


def _times(flights: Sequence[Flight], window: Window, moment: Callable[[Flight], float | None]) -> Quantiles | None:
    """From the arrivals until what came about in the window."""
    return Quantiles.of(
        at_s - flight.arrival.time_s for flight in flights if (at_s := moment(flight)) is not None and window.has(at_s)
    )


def _seconds_within(flight: Flight, window: Window) -> float:
    """For so long it got tokens."""
    if flight.first_token_s is None:
        return 0.0
    end_s = window.end_s if flight.end_s is None else min(flight.end_s, window.end_s)
    return max(0.0, end_s - max(flight.first_token_s, window.start_s))


def _answer_share(flights: Sequence[Flight]) -> float:
    """Of their output tokens."""
    output = sum(flight.arrival.output_tokens for flight in flights)
    return sum(flight.arrival.answer_tokens for flight in flights) / output if output else 0.0


def _grows(window: Window, *, num_arrivals: int) -> bool:
    """Whether the queue does, or never ends; one that was long to begin with grows by a part of what came.

    What waits for the next step or two is none.
    """
    steps_s = _STEPS_WAITED * window.busy_s / window.num_steps if window.num_steps else 0.0
    least = max(window.running_at_end // 20, 4, steps_s * num_arrivals / window.seconds)
    if window.least_waiting > least:
        return True
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
