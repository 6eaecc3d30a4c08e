"""Published runs of the real models beside what the planner says of them, honest where it is off.

H20: Qwen's own table of SGLang at batch 1, (prompt + 2,048) tokens over the whole time. H100: GPUStack's performance
lab, vLLM 0.11, requests that come all at once. The constants of `devices.toml` are calibrated by the marked runs: the
4B's column on H20 (overhead of a layer, attention of one stream, attention of prefills) and 500 prompts of 2,000 on
H100 (share of the FP8 peak that experts' products reach). All others are foretold.

GPUStack's figures are what one client process was streamed by one server process. In their best second its six runs
of conversations streamed 8,005 to 9,788 tokens, whether of four GPUs or eight, FP8 or bf16, vLLM or SGLang: so no more
than that is streamed in the simulation of these runs either.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.planner.cost import CostModel
from cluster.planner.devices import find_device, published_kernels
from cluster.planner.fleet import Fleet
from cluster.planner.layouts import Candidate, Limits, fit
from cluster.planner.load import TraceLoad
from cluster.planner.models import find_model
from cluster.planner.roofline import StepTime
from cluster.planner.setting import Setting
from cluster.planner.simulate import copy_maker
from cluster.planner.step_shape import GroupShape, StepShape
from cluster.planner.workload import Arrival
from workers.layout import ParallelLayout


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run, and its figure in tokens a second."""

    source: str
    model: str
    gpu: str
    layout: ParallelLayout
    requests: int
    prompt: int
    output: int
    counts_prompt: bool
    """The figure is of prompts and outputs together."""
    tokens_per_s: float
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 1024
    are_spread: bool = False
    """Lengths are drawn around these means as those of conversations are; else all are the same."""
    calibrates: bool = False
    most_streamed_per_s: float | None = None
    """Tokens that the publisher's server and client streamed in their best second; None: nothing is known."""


LONGEST = 1024
"""Tokens of a prompt or an output of ShareGPT."""
_TP4 = ParallelLayout(tp=4)
_H20 = "Qwen docs, SGLang, H20, batch 1"
_H100 = "GPUStack, vLLM 0.11, H100"
_H100_STREAMED = 9788.0
"""'Peak output token throughput', the largest of its runs."""


def _h20(model: str, layout: ParallelLayout, figures: Sequence[tuple[int, float]]) -> list[Published]:
    return [
        Published(
            source=_H20,
            model=model,
            gpu="h20",
            layout=layout,
            requests=1,
            prompt=prompt,
            output=2048,
            counts_prompt=True,
            tokens_per_s=rate,
            calibrates=model == "qwen3-4b",
        )
        for prompt, rate in figures
    ]


def _h100(
    layout: ParallelLayout,
    requests: int,
    prompt: int,
    output: int,
    rate: float,
    *,
    budget: int,
    are_spread: bool = False,
    calibrates: bool = False,
) -> Published:
    return Published(
        source=_H100,
        model="qwen3-235b",
        gpu="h100",
        layout=layout,
        requests=requests,
        prompt=prompt,
        output=output,
        counts_prompt=True,
        tokens_per_s=rate,
        max_num_batched_tokens=budget,
        are_spread=are_spread,
        calibrates=calibrates,
        most_streamed_per_s=_H100_STREAMED,
    )


RUNS = [
    *_h20(
        "qwen3-4b",
        ParallelLayout(),
        [(1, 200.61), (6144, 662.0), (14336, 1066.0), (30720, 1468.0), (63488, 1661.0), (129024, 1497.0)],
    ),
    *_h20(
        "qwen3-235b",
        _TP4,
        [(1, 71.65), (6144, 275.0), (14336, 514.0), (30720, 888.0), (63488, 1269.0), (129024, 1320.0)],
    ),
    _h100(_TP4, 984, 216, 198, 7527.8, budget=8192, are_spread=True),
    _h100(ParallelLayout(tp=8), 984, 215, 195, 8102.36, budget=8192, are_spread=True),
    _h100(_TP4, 984, 218, 197, 7787.17, budget=16384, are_spread=True),
    _h100(_TP4, 984, 128, 4, 21211.83, budget=16384),
    _h100(_TP4, 500, 1996, 99, 18950.04, budget=16384, calibrates=True),
    _h100(_TP4, 500, 3996, 182, 16478.79, budget=16384),
    _h100(_TP4, 100, 32000, 83, 15366.32, budget=16384),
]


def published_table() -> list[dict[str, Any]]:
    """Simulates each, and prints the table."""
    print(
        "\npublished                          model       layout  requests × in/out        tokens/s     planner   error"
    )
    rows = []
    for run in RUNS:
        said = foretell(run)
        error = said / run.tokens_per_s - 1
        shape = f"{run.requests} × {run.prompt}/{run.output}"
        mark = "  calibrates" if run.calibrates else ""
        print(
            f"{run.source:34s} {run.model:11s} {run.layout!s:7s} {shape:22s} {run.tokens_per_s:10.1f} {said:11.1f}"
            f" {error:+7.1%}{mark}"
        )
        rows.append(
            {
                "source": run.source,
                "model": run.model,
                "gpu": run.gpu,
                "layout": str(run.layout),
                "requests": run.requests,
                "prompt": run.prompt,
                "output": run.output,
                "published_tokens_per_s": run.tokens_per_s,
                "planned_tokens_per_s": said,
                "error": error,
                "calibrates": run.calibrates,
            }
        )
    return rows


def foretell(run: Published) -> float:
    """Tokens a second, counted as the publisher did."""
    model, device = find_model(run.model), find_device(run.gpu)
    limits = Limits(
        max_num_seqs=run.max_num_seqs,
        max_num_batched_tokens=run.max_num_batched_tokens,
        context=2 * LONGEST if run.are_spread else run.prompt + run.output + 1,
    )
    candidate = Candidate(layout=run.layout, copies=1)
    setting = Setting(
        model=model.config,
        device=device,
        kernels=published_kernels(),
    )
    trace = TraceLoad(trace=tuple(_arrivals(run)))
    fitted = fit(model.config, candidate, device, limits)
    cost = setting.cost(fitted)
    if run.most_streamed_per_s is not None:
        cost = Streamed(cost, run.most_streamed_per_s)
    maker = copy_maker(fitted, cost, max_waiting=run.requests, max_prefill_slowdown=None)
    fleet = Fleet(maker, 1)
    fleet.run(trace.trace)
    ends_s = max(flight.end_s for flight in fleet.flights if flight.end_s is not None)
    return sum(one.prompt_tokens * run.counts_prompt + one.output_tokens for one in trace.trace) / ends_s


class Streamed:
    """Ranks whose steps last at least until their tokens are streamed."""

    def __init__(self, ranks: CostModel, tokens_per_s: float) -> None:
        self._ranks, self._tokens_per_s = ranks, tokens_per_s

    def step(self, shape: StepShape) -> StepTime:
        """What is missing counts as overhead."""
        time = self._ranks.step(shape)
        num_sampled = sum(group.num_decodes + group.num_prefills for group in shape)
        missing_s = num_sampled / self._tokens_per_s - time.total_s
        return time if missing_s <= 0 else time._replace(overhead_s=time.overhead_s + missing_s)

    def context_s(self, group: GroupShape) -> float:
        """Of the ranks."""
        return self._ranks.context_s(group)

    def growth(self, group: GroupShape) -> tuple[float, int]:
        """Of the ranks; where streaming takes longest, a little too much."""
        return self._ranks.growth(group)


def _arrivals(run: Published) -> list[Arrival]:
    if not run.are_spread:
        return [Arrival(0.0, run.prompt, 0, run.output)] * run.requests
    draw = random.Random(0)
    return [Arrival(0.0, _length(draw, run.prompt), 0, _length(draw, run.output)) for _ in range(run.requests)]


def _length(draw: random.Random, mean: int) -> int:
    """Exponential, as about those of ShareGPT are, and cut where the publisher's sampler drops conversations."""
    return min(LONGEST, max(4, round(draw.expovariate(1 / mean))))
