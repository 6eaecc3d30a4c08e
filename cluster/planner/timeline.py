"""A fleet over time: looked at every few seconds, and figures of the requests by when they came."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.planner.control_plane import CopyTraffic, gateway_cpu, router_cpu
from cluster.planner.fleet import Fleet
from cluster.planner.flights import Flight
from cluster.planner.operations import ControlPlane

_NICE_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
_MOST_BUCKETS = 180


def bucket_s(duration_s: float) -> float:
    """How often to look, so that a picture of it is fine enough."""
    return next((nice for nice in _NICE_S if duration_s / nice <= _MOST_BUCKETS), 7200)


@dataclass(frozen=True, kw_only=True)
class Look:
    """The fleet between the last look and this one."""

    time_s: float
    waiting: int
    """Those that no copy has included."""
    longest_queue: int
    """Of one copy."""
    running: int
    copies_ready: int
    copies: int
    kv_use: float
    tokens_per_s: float
    gateway_cpu: float
    router_cpu: float
    """Of the busiest."""
    traffic: Sequence[CopyTraffic]
    num_moved_total: int
    num_recomputed_total: int
    """Tokens."""


_ttft_s = operator.attrgetter("ttft_s")
_answer_s = operator.attrgetter("time_to_answer_s")
_tpot_s = operator.attrgetter("tpot_s")


class Recorder:
    """Looks at a fleet from `start_s` on, until it ends."""

    def __init__(self, fleet: Fleet, every_s: float, num_gateways: int, costs: ControlPlane) -> None:
        self.looks: list[Look] = []
        self.every_s = every_s
        self.start_s = 0.0
        self._fleet, self._num_gateways, self._costs = fleet, num_gateways, costs
        self._last: dict[int, tuple[int, int]] = {}

    def start(self, at_s: float) -> None:
        self.start_s = at_s

        def begin() -> None:
            self._traffic()
            self._fleet.at(at_s + self.every_s, self._look)

        self._fleet.at(at_s, begin)

    def _look(self) -> None:
        fleet = self._fleet
        traffic = self._traffic()
        copies = fleet.copies.values()
        ready = [copy for copy in copies if copy.is_open]
        self.looks.append(
            Look(
                time_s=fleet.now_s - self.start_s,
                waiting=fleet.num_waiting,
                longest_queue=max((copy.num_waiting for copy in copies), default=0),
                running=fleet.num_running,
                copies_ready=len(ready),
                copies=len(copies),
                kv_use=sum(copy.kv_share for copy in ready) / len(ready) if ready else 0.0,
                tokens_per_s=sum(copy.tokens for copy in traffic),
                gateway_cpu=gateway_cpu(traffic, self._num_gateways, self._costs),
                router_cpu=max((router_cpu(copy, self._num_gateways, self._costs) for copy in traffic), default=0.0),
                traffic=traffic,
                num_moved_total=fleet.num_moved_total,
                num_recomputed_total=sum(copy.work.recomputed_tokens for copy in (*copies, *fleet.gone)),
            )
        )
        fleet.at(self.start_s + (len(self.looks) + 1) * self.every_s, self._look)

    def _traffic(self) -> list[CopyTraffic]:
        """Since it was asked last. A copy that has gone since is left out."""
        found = []
        now = {copy.number: copy.tokens_by(self._fleet.now_s) for copy in self._fleet.copies.values()}
        for number, (tokens, steps) in now.items():
            tokens_before, steps_before = self._last.get(number, (0, 0))
            found.append(
                CopyTraffic(steps=(steps - steps_before) / self.every_s, tokens=(tokens - tokens_before) / self.every_s)
            )
        self._last = now
        return found


class Arrived:
    """The requests that came in each bucket of time."""

    def __init__(self, flights: Iterable[Flight], start_s: float, every_s: float, num_buckets: int) -> None:
        self.buckets: list[list[Flight]] = [[] for _ in range(num_buckets)]
        self.ends = [0] * num_buckets
        for flight in flights:
            if 0 <= (index := int((flight.arrival.time_s - start_s) // every_s)) < num_buckets:
                self.buckets[index].append(flight)
            if flight.end_s is not None and 0 <= (index := int((flight.end_s - start_s) // every_s)) < num_buckets:
                self.ends[index] += 1

    def ttft_s(self, share: float) -> list[float | None]:
        return self.column(_ttft_s, share)

    def column(self, value: Callable[[Flight], float | None], share: float) -> list[float | None]:
        """A quantile for each bucket, by when requests came; infinite where it is of those that have no value yet.

        None where none came.
        """
        return [
            _quantile([value(flight) for flight in bucket if not flight.was_refused], share) for bucket in self.buckets
        ]


def _quantile(values: Sequence[float | None], share: float) -> float | None:
    if not values:
        return None
    known = sorted(value for value in values if value is not None)
    place = min(len(values) - 1, int(share * len(values)))
    return known[place] if place < len(known) else math.inf


def look_at_all(looks: Sequence[Look]) -> Look:
    """Cells at one moment, as one fleet."""
    if len(looks) == 1:
        return looks[0]
    ready = sum(look.copies_ready for look in looks)
    return Look(
        time_s=looks[0].time_s,
        waiting=sum(look.waiting for look in looks),
        longest_queue=max(look.longest_queue for look in looks),
        running=sum(look.running for look in looks),
        copies_ready=ready,
        copies=sum(look.copies for look in looks),
        kv_use=sum(look.kv_use * look.copies_ready for look in looks) / max(1, ready),
        tokens_per_s=sum(look.tokens_per_s for look in looks),
        gateway_cpu=max(look.gateway_cpu for look in looks),
        router_cpu=max(look.router_cpu for look in looks),
        traffic=[copy for look in looks for copy in look.traffic],
        num_moved_total=sum(look.num_moved_total for look in looks),
        num_recomputed_total=sum(look.num_recomputed_total for look in looks),
    )


def series(looks: Sequence[Look], every_s: float, arrived: Arrived, ranks: int) -> dict[str, list[Any]]:
    """Columns of equal length."""

    def latency(value: Callable[[Flight], float | None], share: float) -> list[float | None]:
        """Nothing where it is not known."""
        return [None if one == math.inf else one for one in arrived.column(value, share)]

    return {
        "time_s": [look.time_s - every_s / 2 for look in looks],
        "arrivals": [len(bucket) for bucket in arrived.buckets],
        "refused": [sum(flight.was_refused for flight in bucket) for bucket in arrived.buckets],
        "ended": arrived.ends,
        "waiting": [look.waiting for look in looks],
        "longest_queue": [look.longest_queue for look in looks],
        "running": [look.running for look in looks],
        "copies_ready": [look.copies_ready for look in looks],
        "copies": [look.copies for look in looks],
        "gpus": [look.copies * ranks for look in looks],
        "kv_use": [look.kv_use for look in looks],
        "output_tokens_per_s": [look.tokens_per_s for look in looks],
        "ttft_p50_s": latency(_ttft_s, 0.5),
        "ttft_p95_s": latency(_ttft_s, 0.95),
        "time_to_answer_p50_s": latency(_answer_s, 0.5),
        "time_to_answer_p95_s": latency(_answer_s, 0.95),
        "tpot_p50_s": latency(_tpot_s, 0.5),
        "gateway_cpu": [look.gateway_cpu for look in looks],
        "router_cpu": [look.router_cpu for look in looks],
    }
