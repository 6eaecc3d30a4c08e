"""What something that happened did to the requests: how long the queue became, who stood still, when it was over."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.planner.flights import Flight
from cluster.planner.outcome import Quantiles
from cluster.planner.timeline import Arrived, Look
from cluster.planner.upsets import Happened

_BEFORE_S = 600.0
"""Requests that came so long before it are what is compared with."""
_AS_BEFORE = 2.0
"""Times what 95 of 100 waited at most for their first token before: half of them wait no longer now."""
_CALM_LOOKS = 3
"""At the end, that there is something to say."""
_FEW = 4
"""Requests that wait: that is no queue."""


_Seen = tuple[Look, float | None, float | None]
"""The time to the first token of those that came meanwhile, at the median and the 95th percentile."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Until the next thing happened, or the end. What happened at once has its effects together."""

    time_s: float
    what: str
    words: str
    longest_queue: int
    pause_p50_s: float | None
    """Of streams that stood still and went on; None: none did."""
    pause_max_s: float | None
    paused: int
    moved: int
    """To another copy."""
    recomputed_tokens: int
    """Prompts and outputs that were put through the model again."""
    refused: int
    ttft_p95_before_s: float | None
    ttft_p95_worst_s: float | None
    settled_after_s: float | None
    """Queue and time to first token are as before, nobody stands still; None: not in the time that was looked at."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def effects(
    log: Sequence[Happened],
    flights: Sequence[Flight],
    looks: Sequence[Look],
    arrived: Arrived,
    *,
    start_s: float,
) -> list[Effect]:
    """Of all that happened. Looks begin at `start_s` of the fleet's clock, which all other times are of."""
    nexts = [next((later.time_s for later in log if later.time_s > one.time_s), math.inf) for one in log]
    return [
        _effect(one, next_s, flights, looks, arrived, start_s=start_s) for one, next_s in zip(log, nexts, strict=True)
    ]


def _effect(
    one: Happened,
    next_s: float,
    flights: Sequence[Flight],
    looks: Sequence[Look],
    arrived: Arrived,
    *,
    start_s: float,
) -> Effect:
    at_s = one.time_s
    before = [flight for flight in flights if at_s - _BEFORE_S <= flight.arrival.time_s < at_s]
    since = [flight for flight in flights if at_s <= flight.arrival.time_s < next_s]
    was = Quantiles.of(ttft for flight in before if (ttft := flight.ttft_s) is not None)
    stood = [pause for flight in flights for pause in flight.pauses if at_s <= pause[0] < next_s]
    pauses = [until_s - since_s for since_s, until_s in stood]
    num_standing = sum(flight.paused_s is not None and at_s <= flight.paused_s < next_s for flight in flights)
    after = [
        (look, p50, p95)
        for look, p50, p95 in zip(looks, arrived.ttft_s(0.5), arrived.ttft_s(0.95), strict=True)
        if at_s - start_s <= look.time_s < next_s - start_s  # what comes at the time of a look comes before it
    ]
    pause = Quantiles.of(pauses)
    settled_s = _settled_s(
        after, at_s - start_s, None if was is None else was.p95, _queue_before(looks, at_s - start_s)
    )
    return Effect(
        time_s=at_s - start_s,
        what=one.kind,
        words=one.words,
        longest_queue=max((look.waiting for look, _, _ in after), default=0),
        pause_p50_s=None if pause is None else pause.p50,
        pause_max_s=max(pauses, default=None),
        paused=len(pauses) + num_standing,
        moved=_grown(looks, after, lambda look: look.num_moved_total),
        recomputed_tokens=_grown(looks, after, lambda look: look.num_recomputed_total),
        refused=sum(flight.was_refused for flight in since),
        ttft_p95_before_s=None if was is None else was.p95,
        ttft_p95_worst_s=max((p95 for _, _, p95 in after if p95 is not None and p95 < math.inf), default=None),
        settled_after_s=None if num_standing else _later(settled_s, [until_s - at_s for _, until_s in stood]),
    )


def _later(settled_s: float | None, goes_on_s: Sequence[float]) -> float | None:
    """Who stood still goes on, too, before it is as it was."""
    return None if settled_s is None else max(settled_s, *goes_on_s, 0.0)


def _grown(looks: Sequence[Look], after: Sequence[_Seen], count: Callable[[Look], int]) -> int:
    """From the last look before it."""
    if not after:
        return 0
    before = [look for look in looks if look.time_s < after[0][0].time_s][-1:]
    return count(after[-1][0]) - sum(map(count, before))


def _queue_before(looks: Sequence[Look], at_s: float) -> int:
    return max((look.waiting for look in looks if at_s - _BEFORE_S <= look.time_s < at_s), default=0)


def _settled_s(after: Sequence[_Seen], at_s: float, was_s: float | None, queue_before: int) -> float | None:
    """Seconds until it stays calm: requests begin about as soon as before, no queue is longer."""
    settled_s = 0.0
    num_calm = 0
    for look, p50, _ in after:
        is_quick = p50 is None or was_s is None or p50 <= _AS_BEFORE * was_s
        if is_quick and look.waiting <= max(_FEW, queue_before):
            num_calm += 1
        else:
            settled_s, num_calm = look.time_s - at_s, 0
    return settled_s if num_calm >= _CALM_LOOKS else None
