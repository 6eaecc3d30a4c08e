"""A load that goes by the day is headlined by its day, with its busiest hour beside it."""

from __future__ import annotations

import pytest

from cluster.planner.devices import find_device, published_kernels
from cluster.planner.layouts import Candidate, Limits, fit
from cluster.planner.load import DrawnLoad
from cluster.planner.setting import Setting
from cluster.planner.tables import trial_table, verdict
from cluster.planner.trial import Trial, shortlist, try_out
from cluster.planner.workload import Lengths
from tests.real_models import QWEN3_235B
from workers.layout import ParallelLayout

SETTING = Setting(model=QWEN3_235B, device=find_device("h200"), kernels=published_kernels())
LOAD = DrawnLoad(rate_per_s=1.0, lengths=Lengths(prompt=200, thinking=150, answer=50), pattern="diurnal")


def trial(max_num_seqs: int) -> Trial:
    limits = Limits(max_num_seqs=max_num_seqs, max_num_batched_tokens=2048, context=4096)
    candidate = fit(QWEN3_235B, Candidate(layout=ParallelLayout(tp=4), copies=1), SETTING.device, limits)
    (tried,) = try_out(SETTING, shortlist(SETTING, [candidate], LOAD, 1), LOAD)
    return tried


def test_the_headline_is_of_the_whole_day_and_the_busiest_hour_stands_beside_it() -> None:
    tried = trial(64)

    assert tried.busiest is not None
    assert tried.outcome.output_tokens_per_s == pytest.approx(200, rel=0.15)  # the mean of the day, not its night
    assert tried.busiest.output_tokens_per_s == pytest.approx(1.6 * 200, rel=0.15)
    assert tried.as_json()["busiest_hour"]["output_tokens_per_s"] == tried.busiest.output_tokens_per_s
    assert "in the busiest hour" in verdict([tried], LOAD)


def test_a_layout_that_is_too_slow_in_the_busiest_hour_does_not_keep_up() -> None:
    tried = trial(4)  # slots for the mean, not for that hour

    assert not tried.keeps_up
    assert tried.as_json()["keeps_up"] is False
    narrow = "\n".join(str(cell) for cell in trial_table([tried], 80).columns[0].cells)
    assert narrow.startswith("! tp=4")  # where there is no room for a reason
    assert verdict([tried], LOAD).startswith("None of these keeps up with the load in the busiest hour")
