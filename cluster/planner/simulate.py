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

_LOOKS = 16
"""At the queue, over the measured time."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """When it is measured, in seconds: what comes before lets the load settle."""

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
    """The load goes on until the end of the span. Times are of what came about in it: nobody is left out."""
    meter = Meter(fleet)
    fleet.at(span.start_s, meter.begin)
    for look in range(1, _LOOKS):
        fleet.at(span.start_s + look / _LOOKS * (span.end_s - span.start_s), meter.look)
    fleet.at(span.end_s, meter.finish)
    fleet.at(span.end_s, fleet.stop)
    fleet.run(arrivals)
    return meter.outcome(fit)


def replay(fleet: Fleet, arrivals: Sequence[Arrival], fit: Fit) -> Outcome:
    """A trace from its beginning until its last request has ended; whether it was kept up with shows when that came."""
    meter = Meter(fleet)
    meter.begin()
    fleet.at(arrivals[-1].time_s, meter.look)
    fleet.run(arrivals)
    meter.finish()
    return meter.outcome(fit, is_over=True)


class Meter:
    """Reads the counters of all copies at two moments, and the queue between them."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._marks: list[_Mark] = []
        self._waiting: list[int] = []

    def begin(self) -> None:
        self._mark()

    def look(self) -> None:
        self._waiting.append(self._fleet.num_waiting)

    def finish(self) -> None:
        self._mark()

    def outcome(self, fit: Fit, *, is_over: bool = False) -> Outcome:
        """`is_over`: nothing is left at the end, so that the queue counts as it was at the last look."""
        start, end = self._marks
        work = between(start.works, end.works)
        copies = len(self._fleet.copies)
        window = Window(
            start_s=start.time_s,
            seconds=max(end.time_s - start.time_s, 1e-9),
            busy_s=work.busy_s,
            num_copies=copies,
            output_tokens=work.decode_tokens,
            prefill_tokens=work.prefill_tokens,
            num_steps=work.num_steps,
            num_decided_steps=work.num_decided_steps,
            kv_share=work.kv_share_s / work.busy_s if work.busy_s else 0.0,
            preemptions=end.preempted - start.preempted,
            parts=work.parts,
            gaps=work.gaps,
            waiting_at_start=start.waiting,
            waiting_at_end=self._waiting[-1] if is_over else end.waiting,
            least_waiting=min([start.waiting, *self._waiting, end.waiting]),
            running_at_end=end.running,
        )
        layout = fit.candidate.layout
        return judge(
            self._fleet.flights,
            window,
            num_gpus=layout.world_size * copies,
            slots=fit.limits.max_num_seqs * layout.dp * copies,
        )

    def _mark(self) -> None:
        fleet = self._fleet
        fleet.catch_up()
        copies = [*fleet.copies.values(), *fleet.gone]
        self._marks.append(
            _Mark(
                time_s=fleet.now_s,
                works=[copying.deepcopy(copy.work) for copy in copies],
                preempted=sum(copy.scheduler.stats.num_preempted_total for copy in copies),
                waiting=fleet.num_waiting,
                running=fleet.num_running,
            )
        )


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """What is read at a moment."""

    time_s: float
    works: list[Work]
    preempted: int
    waiting: int
    running: int
