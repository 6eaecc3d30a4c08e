"""A candidate over time: with things that happen to it, or as a fleet that grows and shrinks, behind its gateways."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.planner.control_plane import CopyTraffic, Part, Peaks, control_plane, gateways_for
from cluster.planner.doors import Doors
from cluster.planner.effects import Effect, effects
from cluster.planner.fleet import Fleet
from cluster.planner.flights import Flight
from cluster.planner.layouts import Fit
from cluster.planner.load import DrawnLoad, Load, TraceLoad
from cluster.planner.operations import Operations
from cluster.planner.outcome import Quantiles
from cluster.planner.scaling import Autoscaler
from cluster.planner.setting import Setting
from cluster.planner.shortlist import Settled, settle
from cluster.planner.simulate import copy_maker
from cluster.planner.timeline import Arrived, Recorder, bucket_s, series
from cluster.planner.upsets import Operator, Upset
from cluster.planner.workload import Arrival

_WARM_UP = 1.6
"""In lifetimes of a request: before that, the load fills the copies."""
_ROOM, _SWING = 1.15, 1.6
_MOST_TENANTS = 10
"""Whose figures are told one by one, the largest first."""
_POLL_S = 2.0
"""`LinkTimes.poll_ready_s` of the gateways, which are no part of the planner's imports."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is looked at, and for how long."""

    duration_s: float
    upsets: Sequence[Upset] = ()
    """Times count from the beginning of what is looked at."""
    max_copies: int | None = None
    """Autoscaling goes from the candidate's copies up to so many; None: there is none."""
    num_gateways: int | None = None
    """None: as many as are needed."""


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


def follow(setting: Setting, fit: Fit, load: Load, scenario: Scenario, operations: Operations) -> Course:
    """Let the load settle, then watch it for the time of the scenario."""
    began_s = time.perf_counter(), time.process_time()
    cost = setting.cost(fit)
    guess = settle(fit, cost, load.rate_per_s, load.lengths)
    at_peak = settle(fit, cost, load.rate_per_s * _peak(load, scenario), load.lengths)
    num_gateways = scenario.num_gateways or _gateways(fit, at_peak, operations)
    doors = Doors(num_gateways, max_streams=operations.gateway.max_streams, shared_tokens=load.shared_prompt_tokens)
    maker = copy_maker(
        fit,
        cost,
        max_waiting=operations.router.max_waiting,
        shared_prompt_tokens=load.shared_prompt_tokens,
    )
    fleet = Fleet(maker, fit.candidate.copies, doors=doors, poll_s=_POLL_S, patience_s=operations.client_patience_s)
    operator = Operator(fleet, fit, setting.device, operations)
    start_s = 0.0 if isinstance(load, TraceLoad) else _WARM_UP * _life_s(load, guess)
    every_s = bucket_s(scenario.duration_s)
    recorder = Recorder(fleet, every_s, num_gateways, operations.control_plane)
    recorder.start(start_s)
    for upset in scenario.upsets:
        operator.arrange(replace(upset, time_s=start_s + upset.time_s))
    if scenario.max_copies is not None:
        slots = fit.limits.max_num_seqs * fit.candidate.layout.dp
        Autoscaler(
            fleet, operator, operations, least=fit.candidate.copies, most=scenario.max_copies, slots=slots
        ).start()
    fleet.run(_arrivals(load, scenario, fit, start_s), until_s=start_s + scenario.duration_s + every_s / 2)
    return _course(fleet, fit, scenario, operator, recorder, num_gateways, operations, began_s)


def _arrivals(load: Load, scenario: Scenario, fit: Fit, start_s: float) -> Iterator[Arrival]:
    """With the load's own pattern beginning where the settling has ended."""
    match load:
        case TraceLoad():
            return iter(load.trace)
        case DrawnLoad():
            doubled = next((upset.time_s for upset in scenario.upsets if upset.kind == "double-load"), None)
            at_s = None if doubled is None else start_s + doubled
            return replace(load, double_at_s=at_s, begins_s=start_s).arrivals(fit.limits.context)


def _peak(load: Load, scenario: Scenario) -> float:
    """Times the mean, as long as a stream lasts; with some room for chance."""
    swing = _SWING if isinstance(load, DrawnLoad) and load.pattern != "steady" else 1.0
    return _ROOM * swing * (2 if any(upset.kind == "double-load" for upset in scenario.upsets) else 1)


def _life_s(load: Load, guess: Settled) -> float:
    return max(1.0, (load.lengths.thinking + load.lengths.answer) * guess.token_s)


def _gateways(fit: Fit, guess: Settled, operations: Operations) -> int:
    """By the quick estimate."""
    copies = fit.candidate.copies
    each = guess.streams / copies
    traffic = CopyTraffic(steps=1 / guess.token_s, tokens=each / guess.token_s)
    return gateways_for([traffic] * copies, guess.streams, operations)


def _course(
    fleet: Fleet,
    fit: Fit,
    scenario: Scenario,
    operator: Operator,
    recorder: Recorder,
    num_gateways: int,
    operations: Operations,
    began_s: tuple[float, float],
) -> Course:
    looks, start_s, every_s = recorder.looks, recorder.start_s, recorder.every_s
    end_s = start_s + len(looks) * every_s
    arrived = Arrived(fleet.flights, start_s, every_s, len(looks))
    log = [one for one in operator.log if start_s <= one.time_s <= end_s]
    busiest = max(looks, key=lambda look: look.tokens_per_s)
    ranks = fit.candidate.layout.world_size
    works = [copy.work for copy in (*fleet.copies.values(), *fleet.gone)]
    return Course(
        fit=fit,
        scenario=scenario,
        num_gateways=num_gateways,
        series=series(recorder, arrived, ranks),
        effects=effects(log, fleet.flights, looks, arrived, start_s=start_s, end_s=end_s),
        parts=control_plane(
            busiest.traffic,
            num_gateways,
            Peaks(
                gateway_cpu=max(look.gateway_cpu for look in looks),
                router_cpu=max(look.router_cpu for look in looks),
                streams=max(look.running + look.waiting for look in looks),
                waiting=max(look.longest_queue for look in looks),
            ),
            operations,
        ),
        tenants=_tenants([flight for bucket in arrived.buckets for flight in bucket]),
        gpu_hours=sum(look.copies for look in looks) * ranks * every_s / 3600,
        effort=Effort(
            requests=len(fleet.flights),
            virtual_s=fleet.now_s,
            wall_s=time.perf_counter() - began_s[0],
            cpu_s=time.process_time() - began_s[1],
            steps=sum(work.num_steps for work in works),
            decided_steps=sum(work.num_decided_steps for work in works),
        ),
    )


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
