"""Recording rules and alerts under the real promtool: each alert fires for what it is for, and for nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RULES = sorted((ROOT / "helm" / "mull" / "rules").glob("*.yaml"))
CASES = sorted(HERE.glob("*_test.yaml"))

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing: apt-get install prometheus"
)

Rule = dict[str, Any]


def rules() -> list[Rule]:
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[Rule]:
    return [rule for rule in rules() if "alert" in rule]


@needs_promtool
def test_promtool_finds_nothing_to_complain_about() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", *RULES], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_alerts_fire_when_they_should_and_only_then(file: Path, tmp_path: Path) -> None:
    # given: rules without annotations, which promtool would compare word by word
    for source in RULES:
        read = yaml.safe_load(source.read_text())
        for group in read["groups"]:
            for rule in group["rules"]:
                rule.pop("annotations", None)
        (tmp_path / source.name).write_text(yaml.safe_dump(read))
    told = yaml.safe_load(file.read_text()) | {"rule_files": [source.name for source in RULES]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(told))

    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yaml"], capture_output=True, text=True, timeout=100, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    fires, stays = set(), set()
    for file in CASES:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for case in test["alert_rule_test"]:
                (fires if case["exp_alerts"] else stays).add(case["alertname"])

    assert fires == stays == {rule["alert"] for rule in alerts()}


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_it_is_how_bad_and_what_to_do(rule: Rule) -> None:
    page = (ROOT / "docs" / "runbooks.md").read_text()
    headings = {heading.lower() for heading in re.findall(r"^## (\w+)$", page, re.MULTILINE)}

    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{rule['alert'].lower()}"
    assert rule["alert"].lower() in headings


def test_no_runbook_is_about_an_alert_that_is_gone() -> None:
    page = (ROOT / "docs" / "runbooks.md").read_text()

    assert set(re.findall(r"^## (Mull\w+)$", page, re.MULTILINE)) == {rule["alert"] for rule in alerts()}
