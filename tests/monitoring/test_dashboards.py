"""What every panel of every dashboard has, and how they fit together."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from typing import Any

import pytest

from tests.monitoring.live import ROOT

BOARDS: list[dict[str, Any]] = [
    json.loads(file.read_text()) for file in sorted((ROOT / "helm" / "mull" / "dashboards").glob("*.json"))
]
PANELS = [
    pytest.param(panel, id=f"{board['title']}: {panel['title']}")
    for board in BOARDS
    for panel in board["panels"]
    if panel["type"] != "row"
]


def test_the_files_are_what_the_code_says() -> None:
    command = [sys.executable, "-m", "helm.dashboards", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr


def test_there_is_one_for_each_question() -> None:
    assert {board["uid"] for board in BOARDS} == {"mull-service", "mull-thinking", "mull-engine", "mull-fleet"}
    for board in BOARDS:
        assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "installation"}


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_has_a_unit_and_says_what_it_shows(panel: dict[str, Any]) -> None:
    # A heatmap has it on its axis.
    shown = panel["options"]["yAxis"] if panel["type"] == "heatmap" else panel["fieldConfig"]["defaults"]

    assert shown["unit"]
    assert panel["description"].endswith(".")
    assert panel["datasource"]["uid"] == "${datasource}"
    for target in panel["targets"]:
        assert "$installation" in target["expr"]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: str(board["title"]))
def test_panels_lie_beside_each_other_and_on_the_grid(board: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in board["panels"]]

    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    assert len({panel["id"] for panel in board["panels"]}) == len(places)
