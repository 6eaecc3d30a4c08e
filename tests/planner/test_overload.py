"""A load that is more than the devices can carry is told so, with how many would."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.planner.devices import find_device, published_kernels
from cluster.planner.fleet import Fleet
from cluster.planner.flights import Flight, Gaps
from cluster.planner.layouts import Candidate, Limits, fit
from cluster.planner.load import DrawnLoad
from cluster.planner.outcome import Window, judge
from cluster.planner.roofline import StepTime
from cluster.planner.setting import Setting
from cluster.planner.simulate import copy_maker
from cluster.planner.tables import gpus_for, verdict
from cluster.planner.trial import Trial, shortlist, try_out
from cluster.planner.workload import Arrival, Lengths
from tests.real_models import QWEN3_4B, QWEN3_235B
from workers.layout import ParallelLayout

SETTING = Setting(model=QWEN3_4B, device=find_device("h20"), kernels=published_kernels())
LIMITS = Limits(max_num_seqs=8, max_num_batched_tokens=2048, context=4096)
LOAD = DrawnLoad(rate_per_s=20.0, lengths=Lengths(prompt=100, thinking=150, answer=50))

WINDOW = Window(
    start_s=0.0,
    seconds=60.0,
    busy_s=60.0,
    num_copies=1,
    output_tokens=60_000,
    prefill_tokens=0,
    num_steps=3000,
    num_decided_steps=1000,
    kv_share=0.5,
    preemptions=0,
    parts=StepTime(dense_s=60.0),
    gaps=Gaps(),
    waiting_at_start=0,
    waiting_at_end=0,
    least_waiting=0,
    running_at_end=100,
)


def keeps_up(waiting_at_start: int, waiting_at_end: int) -> bool:
    flights = [Flight(key, Arrival(0.0, 10, 5, 5)) for key in range(600)]
    window = replace(WINDOW, waiting_at_start=waiting_at_start, waiting_at_end=waiting_at_end)
    return judge(flights, window, num_gpus=1, slots=256).keeps_up


@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, 5), (40, 60), (700, 700)])
def test_a_queue_that_moves_by_chance_keeps_up(start: int, end: int) -> None:
    assert keeps_up(start, end)


@pytest.mark.parametrize(("start", "end"), [(0, 6), (40, 81), (700, 1100), (1000, 1070)])
def test_a_queue_that_grows_does_not_however_long_it_was(start: int, end: int) -> None:
    assert not keeps_up(start, end)


def tried(copies: int) -> Trial:
    candidate = fit(QWEN3_4B, Candidate(layout=ParallelLayout(tp=1), copies=copies), SETTING.device, LIMITS)
    (trial,) = try_out(SETTING, shortlist(SETTING, [candidate], LOAD, 1), LOAD)
    return trial


def test_as_many_devices_as_are_named_keep_up() -> None:
    too_few = tried(1)
    asked = LOAD.most_output_tokens_per_s(too_few.settled.life_s(LOAD.lengths), LIMITS.context)
    needed = gpus_for(asked, too_few.fit.candidate, too_few.outcome)

    assert not too_few.keeps_up
    assert too_few.outcome.utilisation == pytest.approx(1, abs=0.02)  # those that are refused do not hold it up
    assert f"--gpus {needed}" in verdict([too_few], LOAD)
    assert not tried(needed - 1).keeps_up
    assert tried(needed).keeps_up


def test_prompts_in_line_are_not_held_back_for_the_few_who_decode() -> None:
    """Experts make a few tokens of a prompt as dear as many: at so few a step, the line would hardly move."""
    candidate = Candidate(layout=ParallelLayout(tp=4, expert_tp=4), copies=1)
    setting = replace(SETTING, model=QWEN3_235B, device=find_device("h100"))
    found = fit(QWEN3_235B, candidate, setting.device, replace(LIMITS, max_num_seqs=32, context=8192))
    begun_s = []
    for slowdown in (None, 2.5):
        fleet = Fleet(copy_maker(found, setting.cost(found), max_prefill_slowdown=slowdown), 1)
        fleet.run([Arrival(index * 0.3, 6000, 0, 200) for index in range(12)])
        begun_s.append(max(flight.first_token_s or 0.0 for flight in fleet.flights))

    at_once_s, paced_s = begun_s
    assert paced_s < 4 * at_once_s
