"""One cell of a fleet over time: its copies behind its gateways, with what happens to them.

A fleet may be several cells that know nothing of each other: installations of their own, of which each takes its part
of the load. So they can be simulated beside each other, on as many cores as there are, with the same figures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cluster.planner.control_plane import CopyTraffic, Part, Peaks, control_plane, gateways_for
from cluster.planner.doors import Doors
from cluster.planner.fleet import Fleet
from cluster.planner.flights import Flight
from cluster.planner.layouts import Fit
from cluster.planner.load import DrawnLoad, Load, TraceLoad
from cluster.planner.operations import Operations
from cluster.planner.scaling import Autoscaler
from cluster.planner.setting import Setting
from cluster.planner.shortlist import Settled, settle
from cluster.planner.simulate import copy_maker
from cluster.planner.timeline import Look, Recorder, bucket_s
from cluster.planner.upsets import Happened, Operator, Upset
from cluster.planner.workload import Arrival

_WARM_UP = 1.6
"""In lifetimes of a request: before that, the load fills the copies."""
_ROOM, _SWING = 1.15, 1.6
_POLL_S = 2.0
"""`LinkTimes.poll_ready_s` of the gateways, which are no part of the planner's imports."""
_SEEDS_APART = 1_000_003


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
    num_cells: int = 1
    """That copies, gateways and the load are split into, evenly."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What was seen of one cell."""

    flights: Sequence[Flight]
    looks: Sequence[Look]
    start_s: float
    """Of the cell's clock: when the first look begins."""
    every_s: float
    log: Sequence[Happened]
    num_gateways: int
    parts: Sequence[Part]
    virtual_s: float
    cpu_s: float
    steps: int
    decided_steps: int


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All that is needed to watch one, in any process."""

    setting: Setting
    fit: Fit
    """With the copies of the cell."""
    load: Load
    scenario: Scenario
    """Of this cell alone."""
    operations: Operations


def split(setting: Setting, fit: Fit, load: Load, scenario: Scenario, operations: Operations) -> list[Cell]:
    """The cells of a fleet. What is lost is lost in the first; updates and more load come to all of them."""
    count = scenario.num_cells
    candidate = replace(fit.candidate, copies=fit.candidate.copies // count)
    return [
        Cell(
            setting=setting,
            fit=replace(fit, candidate=candidate),
            load=_share(load, number, count),
            scenario=replace(
                scenario,
                upsets=[one for one in scenario.upsets if not number or one.is_everywhere],
                max_copies=None if scenario.max_copies is None else scenario.max_copies // count,
                num_gateways=None if scenario.num_gateways is None else scenario.num_gateways // count,
                num_cells=1,
            ),
            operations=operations,
        )
        for number in range(count)
    ]


def _share(load: Load, number: int, count: int) -> Load:
    """Requests by chance, or in turn."""
    match load:
        case TraceLoad():
            return replace(load, trace=load.trace[number::count])
        case DrawnLoad():
            return replace(load, rate_per_s=load.rate_per_s / count, seed=load.seed + _SEEDS_APART * number)


def watch(cell: Cell) -> Watched:
    """Let the load settle, then watch it for the time of the scenario."""
    began_s = time.process_time()
    setting, fit, load, scenario, operations = cell.setting, cell.fit, cell.load, cell.scenario, cell.operations
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
    start_s = 0.0 if isinstance(load, TraceLoad) else _WARM_UP * guess.life_s(load.lengths)
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
    works = [copy.work for copy in (*fleet.copies.values(), *fleet.gone)]
    return Watched(
        flights=fleet.flights,
        looks=recorder.looks,
        start_s=start_s,
        every_s=every_s,
        log=operator.log,
        num_gateways=num_gateways,
        parts=_parts(recorder.looks, num_gateways, operations),
        virtual_s=fleet.now_s,
        cpu_s=time.process_time() - began_s,
        steps=sum(work.num_steps for work in works),
        decided_steps=sum(work.num_decided_steps for work in works),
    )


def _parts(looks: Sequence[Look], num_gateways: int, operations: Operations) -> list[Part]:
    busiest = max(looks, key=lambda look: look.tokens_per_s)
    peaks = Peaks(
        gateway_cpu=max(look.gateway_cpu for look in looks),
        router_cpu=max(look.router_cpu for look in looks),
        streams=max(look.running + look.waiting for look in looks),
        waiting=max(look.longest_queue for look in looks),
    )
    return control_plane(busiest.traffic, num_gateways, peaks, operations)


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


def _gateways(fit: Fit, guess: Settled, operations: Operations) -> int:
    """By the quick estimate."""
    copies = fit.candidate.copies
    each = guess.streams / copies
    traffic = CopyTraffic(steps=1 / guess.token_s, tokens=each / guess.token_s)
    return gateways_for([traffic] * copies, guess.streams, operations)
