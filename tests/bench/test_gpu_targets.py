"""Targets of a GPU against what was measured, and the picture of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install triton")

from bench.gpu_cases import H200
from bench.gpu_targets import TARGETS, held_against
from bench.report import Spread

STEP = {"model": "235b", "tp": 8, "communication": 1.0, "keys": 4096, "streams": 1}


def found(results: dict[str, Any]) -> dict[str, tuple[float | None, bool | None]]:
    return {row["target"]: (row["found"], row["is_met"]) for row in held_against(results)}


def test_a_target_is_met_missed_or_not_measured() -> None:
    fast, slow = (STEP | {"step_s": Spread.of([seconds])} for seconds in (4e-3, 6e-3))
    name = "235B tp 8, one stream, seconds a step"
    assert found({"slices": [slow | {"communication": 0.0}, fast]})[name] == (4e-3, True)
    assert found({"slices": [slow]})[name] == (6e-3, False)
    assert set(found({}).values()) == {(None, None)}
    experts = next(target for target in TARGETS if target.part == "kernels")
    hidden, ffn, total, here, _ = H200.experts
    assert experts.row["case"] == f"experts {here} of {total} ({hidden}, {ffn}), 64 tokens, uniform"


def test_the_picture_has_room_for_parts_that_were_not_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib: pip install matplotlib")
    from bench.gpu_plot import draw

    results = tmp_path / "gpu.json"
    steps = [STEP | {"step_s": asdict(Spread.of([4e-3])), "share_of_floor": 0.5}, STEP | {"skipped": "the time was up"}]
    about = {"machine": {"gpu": "H200", "date": "today"}, "versions": {"torch": "2"}}
    results.write_text(json.dumps(about | {"slices": steps}))
    assert draw(results).stat().st_size > 0
