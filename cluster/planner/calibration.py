"""Costs of a machine, fitted to live runs of a model on it; and how well they foretell other runs.

A run is some streams that begin together: its shapes of steps follow from the scheduler alone, so its measured times
are linear in the costs. What is least is the sum of squared relative errors, with costs of zero or more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.errors import ConfigError
from cluster.planner.devices import measured_cpu
from cluster.planner.fitted import Costs, FittedCost
from cluster.planner.flights import Flight
from cluster.planner.rank_work import rank_work
from cluster.planner.roofline import StepTime
from cluster.planner.sim_copy import SimCopy
from cluster.planner.step_shape import GroupShape, StepShape
from cluster.planner.workload import Arrival
from cluster.router.engine_core import Pool
from cluster.router.scheduler_config import SchedulerConfig
from workers.config import ModelConfig
from workers.layout import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the measured engine was set."""

    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    max_in_flight: int = 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """Streams that began together, each with so many tokens in and out, and what was measured (medians)."""

    streams: int
    prompt: int
    output: int
    seconds: float
    """From the first prompt to the last token."""
    ttft_s: float
    """Mean over the streams."""
    tpot_s: float
    """The same, of tokens behind the first."""

    @property
    def tokens_per_s(self) -> float:
        return self.streams * self.output / self.seconds


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A file of live runs."""

    model: str
    memory_gib: float
    engine: Engine
    runs: Sequence[Run]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A run, and what the costs say of it."""

    run: Run
    seconds: float
    ttft_s: float
    tpot_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.run.streams * self.run.output / self.seconds


def read_measured(file: Path) -> Measured:
    """Raises ConfigError."""
    try:
        values: Any = json.loads(file.read_text())
        return Measured(
            model=values["model"],
            memory_gib=float(values["machine"]["memory_gib"]),
            engine=Engine(**values["engine"]),
            runs=[Run(**run) for run in values["runs"]],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--calibrate {file}: no measurements ({type(error).__name__}: {error}); "
            "give what `python -m bench.plan_validation --live --out FILE` has written"
        ) from error


def fit_costs(model: ModelConfig, engine: Engine, runs: Sequence[Run]) -> Costs:
    """Raises ConfigError with fewer than 3 runs."""
    if len(runs) < 3:
        raise ConfigError(f"{len(runs)} runs are too few to fit costs to; give 3 or more, of different loads")
    figures = [figure for run in runs for figure in _Watched(model, engine, run).figures]
    rows = [amounts / measured for amounts, measured in figures if measured > 0]
    return Costs(**dict(zip(Costs.names(), _least_squares(np.array(rows)), strict=True)))


def predict(model: ModelConfig, engine: Engine, costs: Costs, run: Run) -> Prediction:
    """Simulates a run with these costs."""
    simulated = _simulate(_cost(model, costs), engine, run)
    flights = simulated.ended
    ttft = [flight.ttft_s for flight in flights if flight.ttft_s is not None]
    tpot = [flight.tpot_s for flight in flights if flight.tpot_s is not None]
    return Prediction(
        run=run,
        seconds=max(flight.end_s for flight in flights if flight.end_s is not None),
        ttft_s=sum(ttft) / len(ttft),
        tpot_s=sum(tpot) / len(tpot) if tpot else 0.0,
    )


def _cost(model: ModelConfig, costs: Costs) -> FittedCost:
    work = rank_work(model, ParallelLayout(), redundant_experts=0, kv_itemsize=measured_cpu(1.0).kv_itemsize)
    return FittedCost(model, ParallelLayout(), work, costs)


class _Watched:
    """What the steps of a run do until each of its figures is known: amounts by the names of Costs."""

    def __init__(self, model: ModelConfig, engine: Engine, run: Run) -> None:
        # Which steps there are does not depend on their times. Each lasts a second here, so that times count them.
        cost = _Recording(_cost(model, Costs(step=1.0)))
        flights = _simulate(cost, engine, run, may_skip=False).ended
        done = [np.zeros(len(Costs.names()))]
        for shape in cost.shapes:
            amounts = cost.inner.amounts(shape[0])
            done.append(done[-1] + np.array([amounts[name] for name in Costs.names()]))
        firsts = [done[round(flight.first_token_s or 0.0)] for flight in flights]
        lasts = [done[round(flight.end_s or 0.0)] for flight in flights]
        first, last = np.mean(firsts, axis=0), np.mean(lasts, axis=0)
        self.figures = [(done[-1], run.seconds), (first, run.ttft_s)]
        if run.output > 1:
            self.figures.append(((last - first) / (run.output - 1), run.tpot_s))


class _Recording:
    """A cost model that keeps the shapes it was asked for."""

    def __init__(self, inner: FittedCost) -> None:
        self.inner = inner
        self.shapes: list[StepShape] = []

    def step(self, shape: StepShape) -> StepTime:
        self.shapes.append(shape)
        return self.inner.step(shape)

    def context_s(self, group: GroupShape) -> float:
        return self.inner.context_s(group)

    def growth(self, group: GroupShape) -> tuple[float, int]:
        return self.inner.growth(group)


@dataclass(frozen=True)
class _Simulated:
    ended: list[Flight]


def _simulate(cost: FittedCost | _Recording, engine: Engine, run: Run, *, may_skip: bool = True) -> _Simulated:
    config = SchedulerConfig(
        max_model_len=run.prompt + run.output + 1,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_waiting=run.streams,
        max_in_flight=engine.max_in_flight,
    )
    pool = Pool(num_groups=1, num_blocks=engine.num_blocks, block_size=engine.block_size)
    ended: list[Flight] = []
    copy = SimCopy(1, cost, config, pool, on_end=ended.append, may_skip=may_skip)
    copy.add_together([Flight(key, Arrival(0.0, run.prompt, 0, run.output)) for key in range(run.streams)], 0.0)
    while copy.next_s is not None:
        copy.advance()
    return _Simulated(ended)


def _least_squares(rows: npt.NDArray[np.float64]) -> list[float]:
    """x of zero or more with rows @ x nearest to one everywhere: active sets (Lawson and Hanson, 1974)."""
    scale = np.abs(rows).max(axis=0)
    scale[scale == 0] = 1.0
    matrix, target = rows / scale, np.ones(len(rows))
    size = matrix.shape[1]
    x, free = np.zeros(size), np.zeros(size, dtype=bool)
    for _ in range(10 * size):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[free] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-9:
            break
        free[best] = True
        while True:
            solved = np.zeros(size)
            solved[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            if (solved[free] > 0).all():
                x = solved
                break
            falling = free & (solved <= 0)
            step = float(np.min(x[falling] / (x[falling] - solved[falling])))
            x = x + step * (solved - x)
            free &= x > 1e-15
            x[~free] = 0.0
    return [float(value) for value in x / scale]
