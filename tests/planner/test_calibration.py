"""Costs that are fitted to runs, and what they foretell of others."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.errors import ConfigError
from cluster.planner.calibration import Engine, Run, fit_costs, predict, read_measured
from cluster.planner.fitted import Costs
from workers.config import ModelConfig

POCKET = Path(__file__).parents[2] / "deploy" / "models" / "pocket"
ENGINE = Engine(max_num_seqs=32, max_num_batched_tokens=512, block_size=32, num_blocks=1024)
TRUE = Costs(
    step=4e-4,
    weight_byte=5e-11,
    decode_flop=2e-11,
    prefill_flop=1.2e-11,
    kv_byte=1e-10,
    attention_flop=3e-11,
    row=3e-5,
)


def run_of(streams: int, prompt: int, costs: Costs = TRUE) -> Run:
    """What a machine with these costs would measure."""
    asked = Run(streams=streams, prompt=prompt, output=32, seconds=1.0, ttft_s=1.0, tpot_s=1.0)
    said = predict(ModelConfig.from_dir(POCKET), ENGINE, costs, asked)
    return Run(streams=streams, prompt=prompt, output=32, seconds=said.seconds, ttft_s=said.ttft_s, tpot_s=said.tpot_s)


RUNS = [run_of(streams, prompt) for streams in (1, 4, 16) for prompt in (32, 128, 512)]


def measured_file(place: Path) -> Path:
    file = place / "measured.json"
    values = {
        "model": str(POCKET),
        "machine": {"memory_gib": 16.0},
        "engine": asdict(ENGINE),
        "runs": [asdict(run) for run in RUNS],
    }
    file.write_text(json.dumps(values))
    return file


@pytest.mark.parametrize(("streams", "prompt"), [(2, 64), (8, 128), (32, 32), (8, 512)])
def test_costs_fitted_to_some_loads_foretell_others(streams: int, prompt: int) -> None:
    model = ModelConfig.from_dir(POCKET)

    said = predict(model, ENGINE, fit_costs(model, ENGINE, RUNS), run_of(streams, prompt))

    assert said.seconds == pytest.approx(said.run.seconds, rel=0.03)
    assert said.tpot_s == pytest.approx(said.run.tpot_s, rel=0.05)


def test_costs_are_never_negative_where_runs_are_noisy() -> None:
    model = ModelConfig.from_dir(POCKET)
    noisy = [
        Run(**(asdict(run) | {"seconds": run.seconds * (1.2 if index % 2 else 0.8)})) for index, run in enumerate(RUNS)
    ]

    costs = fit_costs(model, ENGINE, noisy)

    assert all(cost >= 0 for cost in asdict(costs).values())


def test_a_machine_that_takes_twice_as_long_is_told_from_its_runs() -> None:
    model = ModelConfig.from_dir(POCKET)
    slow = Costs(**{name: 2 * cost for name, cost in asdict(TRUE).items()})
    runs = [run_of(run.streams, run.prompt, slow) for run in RUNS]

    said = predict(model, ENGINE, fit_costs(model, ENGINE, runs), run_of(8, 128, slow))

    assert said.seconds == pytest.approx(2 * run_of(8, 128).seconds, rel=0.03)


def test_two_runs_are_too_few() -> None:
    with pytest.raises(ConfigError, match="2 runs are too few"):
        fit_costs(ModelConfig.from_dir(POCKET), ENGINE, RUNS[:2])


def test_a_file_of_something_else_names_what_writes_such_files(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"streams": 3}')

    with pytest.raises(ConfigError, match=r"bench\.plan_validation --live --out"):
        read_measured(file)


def test_a_measured_machine_can_be_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--rate",
        "2/s",
        "--prompt",
        "60",
        "--thinking",
        "100",
        "--answer",
        "20",
        "--max-num-batched-tokens",
        "512",
    ]

    code = main(["plan", str(POCKET), "--calibrate", str(measured_file(tmp_path)), "--json", *flags])

    plan = json.loads(capsys.readouterr().out)
    assert code == 0
    assert plan["simulated"][0]["keeps_up"]
    assert plan["layouts"][0]["decode_steps"][0]["floor_s"] is None
    assert "--device cpu" in plan["recommendation"]["flags"]


def test_more_than_the_measured_rank_cannot_be_planned_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", str(POCKET), "--calibrate", str(measured_file(tmp_path)), "--gpus", "2"])

    assert code == 2
    assert "one rank" in capsys.readouterr().err
