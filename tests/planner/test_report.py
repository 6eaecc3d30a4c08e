"""The report of a plan: well-formed, closed in itself, and of what the JSON says."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cluster.cli import main
from cluster.planner.command import add_plan_command, make_plan
from cluster.planner.operations import described_operations
from cluster.planner.report.axes import clock, from_zero, powers_of_two, seconds_from_zero
from cluster.planner.report.page import render, seconds

BAD_NAME = "<script>alert('1')</script> & \"co\" ]]>"


def plan_of(*words: str) -> dict[str, Any]:
    """What `mull plan … --json` prints."""
    parser = argparse.ArgumentParser()
    add_plan_command(parser)
    plan: dict[str, Any] = json.loads(json.dumps(make_plan(parser.parse_args(words)).as_json()))
    return plan


@pytest.fixture(scope="module")
def simulated() -> dict[str, Any]:
    load = ["--rate", "20/s", "--prompt", "200", "--thinking", "60", "--answer", "20"]
    return plan_of("qwen3-4b", "--gpu", "l40s", "--gpus", "2", "--context", "8k", *load)


@pytest.fixture
def with_what_if(simulated: dict[str, Any]) -> dict[str, Any]:
    plan = copy.deepcopy(simulated)
    event = {"time_s": 70.0, "what": "lose-rank", "words": "a rank is lost", "longest_queue": 9, "pause_p50_s": 30.0}
    event |= {
        "pause_max_s": 31.0,
        "paused": 12,
        "moved": 3,
        "recomputed_tokens": 700,
        "refused": 0,
        "ttft_p95_before_s": 0.2,
        "ttft_p95_worst_s": 31.5,
    }
    core = {"part": "gateway's core", "used": 1.2, "limit": 1.0, "unit": "cores", "words": "busy", "is_over": True}
    plan["what_if"] = {
        "candidate": {"copies": 2, "tp": 1, "dp": 1, "expert_tp": 1},
        "gateways": 1,
        "gpu_hours": 0.2,
        "series": {
            "time_s": [30.0, 90.0, 150.0, 210.0, 270.0],
            "waiting": [0, 9, 4, 0, 0],
            "running": [20, 0, 24, 20, 20],
            "ttft_p50_s": [0.1, 0.1, None, 0.2, 0.1],
            "tpot_p50_s": [None] * 5,
        },
        "events": [event | {"settled_after_s": None}],
        "control_plane": [core, core | {"part": "links", "limit": None, "is_over": False}],
        "tenants": [{"tenant": "acme", "requests": 7, "ttft_p95_s": None, "refused": 0}],
    }
    return plan


def parsed(plan: dict[str, Any]) -> ElementTree.Element:
    """Every tag is closed and every text escaped, or this raises."""
    return ElementTree.fromstring(render(plan))


def texts(page: ElementTree.Element, tag: str) -> list[str]:
    return ["".join(element.itertext()).strip() for element in page.iter(tag)]


def section(page: ElementTree.Element, title: str) -> ElementTree.Element:
    return next(one for one in page.iter("section") if one.findtext("h2") == title)


def figure(page: ElementTree.Element, title: str) -> ElementTree.Element:
    return next(one for one in page.iter("figure") if one.findtext("figcaption") == title)


def test_the_report_needs_nothing_but_itself(with_what_if: dict[str, Any]) -> None:
    page = parsed(with_what_if)

    tags = {element.tag for element in page.iter()}
    attributes = {name for element in page.iter() for name in element.attrib}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base"}
    assert not {name for name in attributes if name.endswith(("src", "href", "srcset")) or name.startswith("on")}
    assert not any(word in style for style in texts(page, "style") for word in ("url(", "@import", "<"))


def test_names_from_outside_are_text(with_what_if: dict[str, Any]) -> None:
    written = json.dumps(with_what_if)
    for name in ("acme", with_what_if["simulated"][0]["layout"]):
        written = written.replace(json.dumps(name), json.dumps(BAD_NAME))
    plan = json.loads(written)
    plan["model"] = plan["what_if"]["events"][0]["what"] = plan["recommendation"]["helm_values"] = BAD_NAME

    page = parsed(plan)

    assert not list(page.iter("script"))
    assert texts(page, "title")[0].startswith(BAD_NAME)
    assert BAD_NAME in texts(page, "pre")
    assert texts(page, "td").count(BAD_NAME) == 3  # simulated, layouts, tenants
    assert BAD_NAME in texts(figure(page, "Queue"), "text")


def test_every_layout_is_there_with_its_figures_or_its_problem() -> None:
    plan = plan_of("qwen3-235b", "--gpu", "h100", "--gpus", "4", "--context", "64k")

    rows = {cells[0]: cells for row in parsed(plan).iter("tr") if (cells := texts(row, "td"))}

    for layout in plan["layouts"]:
        cells = rows[layout["layout"]]
        if layout["fits"]:
            assert f"{layout['kv_tokens']:,}" in cells
        else:
            assert cells[-1] == f"does not fit: {layout['problem']}"
    assert {layout["fits"] for layout in plan["layouts"]} == {True, False}


def test_the_recommendation_can_be_copied(simulated: dict[str, Any]) -> None:
    flags, values = texts(parsed(simulated), "pre")

    assert flags.replace(" \\\n   ", "") == simulated["recommendation"]["flags"]
    assert values == simulated["recommendation"]["helm_values"].strip()


def test_the_busiest_hour_stands_below_the_day(simulated: dict[str, Any]) -> None:
    plan = copy.deepcopy(simulated)
    best = plan["simulated"][0]
    best["busiest_hour"] = best | {"keeps_up": False, "limit": "of that hour"}

    rows = [texts(row, "td") for row in section(parsed(plan), "Under the load").iter("tr")]

    assert [row[-1] for row in rows if row[:1] == ["in the busiest hour"]] == ["too slow: of that hour"]


def test_simulated_layouts_are_compared(simulated: dict[str, Any]) -> None:
    page = parsed(simulated)

    names = [trial["layout"] for trial in simulated["simulated"]]
    assert len(names) > 1
    for title in ("Time to the first token", "Time to the first token of the answer", "Time of a token"):
        assert [text for text in texts(figure(page, title), "text") if text in names] == names
    assert simulated["verdict"] in texts(page, "p")


def test_a_mean_step_is_drawn_in_all_its_parts(simulated: dict[str, Any]) -> None:
    for trial in simulated["simulated"]:
        step_s = sum(trial["mean_step"].values())
        assert step_s * trial["num_steps"] > 0
        assert trial["mean_step"]["overhead_s"] < step_s

    bars = list(figure(parsed(simulated), "Where the mean step goes").iter("rect"))
    assert len(bars) == 6 * len(simulated["simulated"])


def test_every_constant_is_there_with_its_source(simulated: dict[str, Any]) -> None:
    operations = described_operations()
    cells = texts(parsed(simulated | {"operations": operations}), "td")

    for constants in (simulated["device"]["constants"], simulated["kernels"], operations):
        assert constants
        for name, constant in constants.items():
            assert name in cells
            assert constant["source"] in cells


def test_a_line_stops_where_nobody_was_measured(with_what_if: dict[str, Any]) -> None:
    what_if = section(parsed(with_what_if), "What if")

    runs = [line.attrib["points"].count(",") for line in figure(what_if, "Time to the first token").iter("polyline")]
    assert runs == [2, 2]
    assert texts(what_if, "figcaption") == ["Queue", "Time to the first token"]
    assert "lose-rank" in texts(figure(what_if, "Queue"), "text")


def test_what_fits_nowhere_is_said() -> None:
    load = ["--rate", "1/s"]
    page = parsed(plan_of("qwen3-235b", "--gpu", "l40s", "--gpus", "1", "--context", "32k", *load))

    assert any(text.startswith("Nothing fits") for text in texts(page, "p"))
    assert not list(page.iter("figure"))


def test_the_command_writes_the_same_report_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "a.html", tmp_path / "b.html"]
    for file in files:
        assert main(["plan", "qwen3-4b", "--gpus", "1", "--json", "--html", str(file)]) == 0

    first, second = (file.read_text(encoding="utf-8") for file in files)
    assert first == second
    assert first == render(json.loads(capsys.readouterr().out.partition("\n}\n")[0] + "}"))


@pytest.mark.parametrize("largest", [0.0, 1e-4, 0.7, 1.0, 3.2, 99.0, 100.0, 101.0, 12345.0])
def test_an_axis_holds_its_largest_value_with_few_even_ticks(largest: float) -> None:
    axis = from_zero("x", largest)

    gaps = {round(after - before, 9) for before, after in zip(axis.ticks, axis.ticks[1:], strict=False)}
    assert axis.high >= largest
    assert axis.high == pytest.approx(axis.ticks[-1])
    assert len(gaps) == 1
    assert 1 <= len(axis.ticks) - 1 <= 5


def test_axes_write_what_people_read() -> None:
    assert [seconds_from_zero("t", 0.03).label(value) for value in (0.0, 0.03)] == ["0", "30"]
    assert [clock("time", 0, 7200).label(value) for value in (0, 3600)] == ["0", "60"]
    assert clock("time", 0, 4 * 86400).title == "time, d"
    assert powers_of_two("streams", 1).ticks == (1.0, 2.0)
    assert powers_of_two("streams", 4096).share(64) == pytest.approx(0.5)


def test_times_have_the_unit_that_suits_them() -> None:
    written = [seconds(value) for value in (None, 0.0301, 4.25, 212.0, 7500.0)]

    assert written == ["–", "30.1 ms", "4.25 s", "3.53 min", "2.08 h"]
