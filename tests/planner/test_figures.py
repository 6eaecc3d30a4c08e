"""Figures of a simulated load agree with each other, with the load and with Little's law, whatever the load."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.planner.command import add_plan_command, make_plan
from cluster.planner.devices import find_device, published_kernels
from cluster.planner.layouts import Candidate, Limits, fit
from cluster.planner.load import DrawnLoad, Load, Pattern, TraceLoad
from cluster.planner.setting import Setting
from cluster.planner.tables import load_words
from cluster.planner.trial import Trial, shortlist, try_out
from cluster.planner.workload import Arrival, Lengths, read_trace
from tests.real_models import QWEN3_4B, QWEN3_235B
from workers.layout import ParallelLayout

SETTING = Setting(model=QWEN3_4B, device=find_device("h100"), kernels=published_kernels())
LIMITS = Limits(max_num_seqs=64, max_num_batched_tokens=4096, context=8192)


def tried(load: Load, *, tp: int = 2, copies: int = 1, limits: Limits = LIMITS) -> Trial:
    candidate = fit(QWEN3_4B, Candidate(layout=ParallelLayout(tp=tp), copies=copies), SETTING.device, limits)
    (trial,) = try_out(SETTING, shortlist(SETTING, [candidate], load, 1), load)
    return trial


def drawn(rate_per_s: float, lengths: tuple[int, int, int], pattern: Pattern = "steady", seed: int = 0) -> DrawnLoad:
    prompt, thinking, answer = lengths
    return DrawnLoad(
        rate_per_s=rate_per_s,
        lengths=Lengths(prompt=prompt, thinking=thinking, answer=answer),
        pattern=pattern,
        seed=seed,
    )


SHORT, CHAT, LONG = (100, 100, 50), (500, 600, 100), (4000, 0, 1)
LOADS = [
    drawn(1 / 3600, SHORT),
    drawn(8.0, SHORT),
    drawn(4.0, CHAT),
    drawn(5.0, SHORT, "diurnal"),
    drawn(2.0, SHORT, "bursty"),
    drawn(5.0, LONG),
    drawn(1000.0, (1, 0, 1)),
]
TOO_MUCH = [drawn(15.0, CHAT), drawn(200.0, SHORT), drawn(60.0, LONG)]


@pytest.mark.parametrize("load", LOADS, ids=range(len(LOADS)))
def test_of_a_load_that_is_kept_up_with_comes_out_what_goes_in(load: DrawnLoad) -> None:
    trial = tried(load)

    outcome = trial.outcome
    asked = load.rate_per_s * load.as_drawn(LIMITS.context).output_tokens
    assert trial.keeps_up
    assert outcome.refused == 0
    assert outcome.output_tokens_per_s == pytest.approx(asked, rel=0.15)  # of 400 requests or more, by chance
    assert outcome.ttft is not None
    assert outcome.time_to_answer is not None
    assert outcome.ttft.p50 <= outcome.time_to_answer.p50
    assert outcome.utilisation <= 1
    if outcome.tpot is not None and load.lengths.answer > 1:
        assert outcome.mean_running == pytest.approx(outcome.output_tokens_per_s * outcome.tpot.p50, rel=0.1)  # Little


@pytest.mark.parametrize("load", TOO_MUCH, ids=range(len(TOO_MUCH)))
def test_of_a_load_that_is_too_much_comes_out_less_with_the_ranks_busy_all_the_time(load: DrawnLoad) -> None:
    outcome = tried(load).outcome

    assert not outcome.keeps_up
    assert outcome.output_tokens_per_s < load.rate_per_s * load.as_drawn(LIMITS.context).output_tokens
    assert outcome.utilisation == pytest.approx(1, abs=0.02)
    assert outcome.refused + outcome.unfinished <= outcome.requests


@pytest.mark.parametrize("seed", range(2))
def test_chance_does_not_make_a_load_fit_that_is_a_seventh_too_much(seed: int) -> None:
    few = replace(LIMITS, max_num_seqs=16)

    assert tried(drawn(3.4, CHAT, seed=seed), limits=few).keeps_up
    assert not tried(drawn(4.8, CHAT, seed=seed), limits=few).keeps_up


def test_what_an_answer_costs_is_the_price_of_all_devices() -> None:
    outcome = tried(drawn(16.0, SHORT), tp=1, copies=16).outcome  # half of the copies are simulated

    hours = outcome.gpu_hours_per_million_answer_tokens
    assert hours == pytest.approx(16 / 3600 / outcome.answer_tokens_per_s * 1e6)


def trace(count: int, every_s: float, begins_s: float = 0.0) -> TraceLoad:
    return TraceLoad(trace=tuple(Arrival(begins_s + index * every_s, 100, 400, 100) for index in range(count)))


def test_a_trace_is_kept_up_with_where_nothing_much_waits_when_its_last_request_comes() -> None:
    slow, fast, at_once = (tried(trace(200, every_s)).outcome for every_s in (1.0, 0.02, 0.0))

    assert slow.keeps_up
    assert not fast.keeps_up
    assert at_once.keeps_up  # a batch is no rate
    assert (
        slow.mean_running == pytest.approx(slow.output_tokens_per_s * slow.tpot.p50, rel=0.02) if slow.tpot else False
    )


def test_the_clock_of_a_trace_may_begin_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [{"time_s": 1.7e9 + second, "prompt": 10, "answer": 5} for second in (3, 1, 2)]
    file.write_text("\n".join(map(json.dumps, lines)))

    assert [arrival.time_s for arrival in read_trace(file)] == [0, 1, 2]


def test_requests_of_a_trace_that_are_longer_than_the_context_are_named(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps({"time_s": 0, "prompt": 900, "answer": 200}))
    parser = argparse.ArgumentParser()
    add_plan_command(parser)

    with pytest.raises(ConfigError, match=r"1 of 1 requests are longer than the context of 1,024 tokens.* has 1,100"):
        make_plan(parser.parse_args(["qwen3-4b", "--gpus", "1", "--context", "1Ki", "--load", str(file)]))


def test_a_load_whose_lengths_are_cut_is_told_so_and_asks_for_less() -> None:
    load = drawn(1.0, CHAT)

    assert load_words(load, 8192).endswith("100 of answer")
    assert load_words(load, 1300).endswith("are longer than the context, and cut to it")
    assert load.most_output_tokens_per_s(1.0, 1300) < 0.95 * load.most_output_tokens_per_s(1.0, 8192)
    assert load.most_output_tokens_per_s(1.0, 8192) == pytest.approx(700, rel=0.02)


def test_bursts_ask_for_less_the_longer_requests_last() -> None:
    load = drawn(1.0, CHAT, "bursty")
    mean = replace(load, pattern="steady").most_output_tokens_per_s(1.0, 8192)

    asked = [load.most_output_tokens_per_s(life_s, 8192) / mean for life_s in (10.0, 60.0, 300.0, 3000.0)]

    assert asked == pytest.approx([3.57, 2.14, 1.0, 1.0], abs=0.01)


def test_of_layouts_that_are_all_too_slow_those_that_give_most_are_simulated() -> None:
    setting = replace(SETTING, model=QWEN3_235B, device=find_device("h200"))
    few = Limits(max_num_seqs=4, max_num_batched_tokens=2048, context=4096)
    load = drawn(20.0, SHORT)
    layouts = [ParallelLayout(tp=8), ParallelLayout(tp=4, dp=2), ParallelLayout(tp=1, dp=8)]
    fits = [fit(QWEN3_235B, Candidate(layout=layout, copies=1), setting.device, few) for layout in layouts]

    chosen = shortlist(setting, fits, load, 3)

    assert [found.candidate.layout.dp for found, _ in chosen] == [8, 2, 1]  # not those of the quickest steps
    for one in chosen:
        (trial,) = try_out(setting, [one], load)
        assert not trial.keeps_up
        assert trial.settled.tokens_per_s == pytest.approx(trial.outcome.output_tokens_per_s, rel=0.15)


def test_without_thoughts_the_layout_is_simulated_first_that_is_quickest_with_prompts() -> None:
    setting = replace(SETTING, model=QWEN3_235B, device=find_device("h100"))
    layouts = [
        Candidate(layout=ParallelLayout(tp=4, expert_tp=4), copies=2),
        Candidate(layout=ParallelLayout(tp=8), copies=1),
    ]
    fits = [fit(QWEN3_235B, layout, setting.device, LIMITS) for layout in layouts]

    first = {
        thinking: shortlist(setting, fits, drawn(0.1, (6000, thinking, 100)), 1)[0][0].candidate
        for thinking in (0, 2000)
    }

    assert first == {0: layouts[1], 2000: layouts[0]}
