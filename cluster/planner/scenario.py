"""A candidate over time: with things that happen to it, or as a fleet that grows and shrinks, behind its gateways."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from cluster.planner.cell import Cell, Scenario, Watched, split, watch
from cluster.planner.control_plane import Part
from cluster.planner.effects import Effect, effects
from cluster.planner.flights import Flight
from cluster.planner.layouts import Fit
from cluster.planner.load import Load
from cluster.planner.operations import Operations
from cluster.planner.outcome import Quantiles
from cluster.planner.setting import Setting
from cluster.planner.timeline import Arrived, look_at_all, series

_MOST_TENANTS = 10
"""Whose figures are told one by one, the largest first."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What the simulation itself took."""

    requests: int
    virtual_s: float
    wall_s: float
    cpu_s: float
    """Less than the wall time where others compute, too."""
    steps: int
    decided_steps: int

    @property
    def requests_per_minute(self) -> float:
        return 60 * self.requests / max(self.wall_s, 1e-9)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"requests_per_minute": self.requests_per_minute}


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """Figures of one."""

    tenant: str
    requests: int
    refused: int
    ttft_p95_s: float | None


@dataclass(frozen=True, kw_only=True)
class Course:
    """What became of it."""

    fit: Fit
    scenario: Scenario
    num_gateways: int
    series: dict[str, list[Any]]
    effects: list[Effect]
    parts: list[Part]
    tenants: list[Tenant]
    gpu_hours: float
    effort: Effort

    def as_json(self) -> dict[str, Any]:
        candidate = self.fit.candidate
        layout = candidate.layout
        where = {"copies": candidate.copies, "tp": layout.tp, "dp": layout.dp, "expert_tp": layout.expert_tp}
        return {
            "candidate": where,
            "gpus": candidate.copies * layout.world_size,
            "gateways": self.num_gateways,
            "gpu_hours": self.gpu_hours,
            "series": self.series,
            "events": [one.as_json() for one in self.effects],
            "control_plane": [part.as_json() for part in self.parts],
            "tenants": [asdict(tenant) for tenant in self.tenants],
            "simulation": self.effort.as_json(),
        }


def follow(
    setting: Setting,
    fit: Fit,
    load: Load,
    scenario: Scenario,
    operations: Operations,
    *,
    num_processes: int | None = None,
) -> Course:
    """Watch all cells, on as many cores as there are or are given: the figures are the same."""
    began_s = time.perf_counter()
    cells = split(setting, fit, load, scenario, operations)
    seen = _watch_all(cells, min(len(cells), num_processes or len(os.sched_getaffinity(0))))
    return _course(fit, scenario, seen, began_s)


def _watch_all(cells: Sequence[Cell], num_processes: int) -> list[Watched]:
    if num_processes == 1:
        return [watch(cell) for cell in cells]
    with ProcessPoolExecutor(num_processes) as processes:
        return list(processes.map(watch, cells))


def _course(fit: Fit, scenario: Scenario, seen: Sequence[Watched], began_s: float) -> Course:
    """Of all cells together. Their clocks are the same."""
    start_s, every_s = seen[0].start_s, seen[0].every_s
    flights = [flight for one in seen for flight in one.flights]
    looks = [look_at_all([look for look in part if look]) for part in zip_longest(*(one.looks for one in seen))]
    end_s = start_s + len(looks) * every_s
    arrived = Arrived(flights, start_s, every_s, len(looks))
    log = [one for one in seen[0].log if start_s <= one.time_s <= end_s]
    ranks = fit.candidate.layout.world_size
    return Course(
        fit=fit,
        scenario=scenario,
        num_gateways=sum(one.num_gateways for one in seen),
        series=series(looks, every_s, arrived, ranks),
        effects=effects(log, flights, looks, arrived, start_s=start_s),
        parts=[max(parts, key=_fullness) for parts in zip(*(one.parts for one in seen), strict=True)],
        tenants=_tenants([flight for bucket in arrived.buckets for flight in bucket]),
        gpu_hours=sum(look.copies for look in looks) * ranks * every_s / 3600,
        effort=Effort(
            requests=len(flights),
            virtual_s=max(one.virtual_s for one in seen),
            wall_s=time.perf_counter() - began_s,
            cpu_s=sum(one.cpu_s for one in seen),
            steps=sum(one.steps for one in seen),
            decided_steps=sum(one.decided_steps for one in seen),
        ),
    )


def _fullness(part: Part) -> float:
    """Of the cells, the one that uses most of it is told."""
    return part.used / part.limit if part.limit else part.used


def _tenants(flights: Sequence[Flight]) -> list[Tenant]:
    """The largest ones; empty where there is but one."""
    by_name: dict[str, list[Flight]] = {}
    for flight in flights:
        by_name.setdefault(flight.arrival.tenant, []).append(flight)
    if len(by_name) < 2:
        return []
    largest = sorted(by_name, key=lambda name: (-len(by_name[name]), name))[:_MOST_TENANTS]
    return [_tenant(name, by_name[name]) for name in largest]


def _tenant(name: str, flights: Sequence[Flight]) -> Tenant:
    ttft = Quantiles.of(one for flight in flights if (one := flight.ttft_s) is not None)
    return Tenant(
        tenant=name,
        requests=len(flights),
        refused=sum(flight.was_refused for flight in flights),
        ttft_p95_s=None if ttft is None else ttft.p95,
    )
