"""Runs a load on a candidate in virtual time, and measures it once it has settled."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.config import EngineConfig
from cluster.planner.cost import CostModel
from cluster.planner.fleet import Fleet
from cluster.planner.flights import Flight, Work
from cluster.planner.layouts import BLOCK_SIZE, Fit
from cluster.planner.outcome import Outcome, Window, between, judge
from cluster.planner.sim_copy import SimCopy
from cluster.planner.workload import Arrival
from cluster.router.engine_core import Pool
from cluster.router.scheduler_config import SchedulerConfig

_CHECKS = 40
"""How often it is looked whether all that are measured have ended."""
_LONGEST = 4
"""Times the measured window: who has not ended by then is counted as unfinished."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """When arrivals are measured: those before let the load settle. Seconds."""

    start_s: float
    end_s: float


def copy_maker(
    fit: Fit,
    cost: CostModel,
    *,
    max_waiting: int = 256,
    shared_prompt_tokens: int = 0,
    max_in_flight: int = 2,
    max_prefill_slowdown: float | None = EngineConfig().max_prefill_slowdown,
) -> Callable[[int, Callable[[Flight], object]], SimCopy]:
    """For a Fleet: copies of this candidate, with the scheduler's settings that would be served with."""
    limits = fit.limits
    config = SchedulerConfig(
        max_model_len=limits.context,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_waiting=max_waiting,
        max_in_flight=max_in_flight,
        max_prefill_slowdown=max_prefill_slowdown,
    )
    pool = Pool(num_groups=fit.candidate.layout.dp, num_blocks=fit.num_blocks, block_size=BLOCK_SIZE)

    def make(number: int, on_end: Callable[[Flight], object]) -> SimCopy:
        return SimCopy(number, cost, config, pool, on_end=on_end, shared_prompt_tokens=shared_prompt_tokens)

    return make


def simulate(fleet: Fleet, arrivals: Iterator[Arrival], span: Span, fit: Fit) -> Outcome:
    """The load goes on until all that came in the span have ended, or for a few times as long as it."""
    meter = Meter(fleet)
    fleet.at(span.start_s, meter.begin)
    fleet.at(span.end_s, meter.finish)

    def check() -> None:
        if all(flight.end_s is not None or flight.was_refused for flight in measured()):
            fleet.stop()
        else:
            fleet.at(fleet.now_s + (span.end_s - span.start_s) / _CHECKS, check)

    def measured() -> list[Flight]:
        return [one for one in fleet.flights if span.start_s <= one.arrival.time_s < span.end_s]

    fleet.at(span.end_s, check)
    fleet.run(arrivals, until_s=span.start_s + _LONGEST * (span.end_s - span.start_s))
    return meter.outcome(measured(), fit)


def replay(fleet: Fleet, arrivals: Sequence[Arrival], fit: Fit) -> Outcome:
    """A trace from its beginning until its last request has ended."""
    meter = Meter(fleet)
    meter.begin()
    fleet.run(arrivals)
    meter.finish()
    return meter.outcome(fleet.flights, fit)


class Meter:
    """Reads the counters of all copies at two moments."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._marks: list[tuple[float, list[Work], int, int, int]] = []

    def begin(self) -> None:
        self._mark()

    def finish(self) -> None:
        self._mark()

    def outcome(self, flights: Sequence[Flight], fit: Fit) -> Outcome:
        (start_s, works, preempted, waiting, _), (end_s, works_at_end, preempted_at_end, waiting_at_end, running) = (
            self._marks
        )
        work = between(works, works_at_end)
        output = sum(flight.arrival.output_tokens for flight in flights)
        window = Window(
            seconds=max(end_s - start_s, 1e-9),
            busy_s=work.busy_s,
            num_copies=len(self._fleet.copies),
            output_tokens=work.decode_tokens,
            prefill_tokens=work.prefill_tokens,
            num_steps=work.num_steps,
            num_decided_steps=work.num_decided_steps,
            kv_share=work.kv_share_s / work.busy_s if work.busy_s else 0.0,
            preemptions=preempted_at_end - preempted,
            parts=work.parts,
            gaps=work.gaps,
            waiting_at_start=waiting,
            waiting_at_end=waiting_at_end,
            running_at_end=running,
        )
        layout, copies = fit.candidate.layout, len(self._fleet.copies)
        return judge(
            flights,
            window,
            num_gpus=layout.world_size * copies,
            answer_share=sum(flight.arrival.answer_tokens for flight in flights) / output if output else 0.0,
            slots=fit.limits.max_num_seqs * layout.dp * copies,
        )

    def _mark(self) -> None:
        fleet = self._fleet
        fleet.catch_up()
        copies = [*fleet.copies.values(), *fleet.gone]
        works = [copying.deepcopy(copy.work) for copy in copies]
        preempted = sum(copy.scheduler.stats.num_preempted_total for copy in copies)
        self._marks.append((fleet.now_s, works, preempted, fleet.num_waiting, fleet.num_running))
