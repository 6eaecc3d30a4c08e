"""`mull plan --compile`: the same figures from the same modules as machine code; one line where it cannot be made."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.planner import machine_code

FLEET = (
    "plan qwen3-235b --gpus 32 --copies 8 --rate 16/s --prompt 500 --thinking 100 --answer 50 --lose-rank 30s "
    "--for 2m --cells 2 --json"
)
TESTS_OF_ITS_SOURCES = ("tests/planner/test_fast_forward.py", "tests/router")
REPLACES_A_METHOD = "test_a_head_that_does_not_fit_is_not_looked_up_again_while_the_cache_stays_as_it_is"
"""Which machine code has no room for."""


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    code = main([*FLEET.split(), "--compile"])
    assert code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_cache_that_cannot_be_written_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert "set XDG_CACHE_HOME to a directory that can be written" in refusal(capsys)


def test_without_mypyc_it_is_told_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine_code, "version", missing)
    assert "pip install 'mull[compile]'" in refusal(capsys)


def test_without_a_compiler_it_is_told_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "/no/such/compiler")
    monkeypatch.setattr(machine_code, "MODULES", {"cluster/planner": ("step_shape",)})
    assert "install them, or leave it out" in refusal(capsys)
    assert list((tmp_path / "mull" / "machine-code").iterdir()) == []


def test_machine_code_that_python_does_not_take_is_not_begun_again_for_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where its files were deleted, but not their directory: this process is the one that was begun with it."""
    monkeypatch.setattr(machine_code, "_made", lambda: tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert f"Python does not take what lies in {tmp_path}; delete it" in refusal(capsys)


def test_what_a_killed_process_left_is_removed_when_it_is_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine_code, "MODULES", {"no": ("such",)})
    cache = tmp_path / "mull" / "machine-code"
    old, young = cache / "unfinished-old", cache / "unfinished-young"
    for directory in (old, young):
        directory.mkdir(parents=True)
    os.utime(old, (0, 0))
    refusal(capsys)
    assert list(cache.iterdir()) == [young]


def test_a_changed_source_is_compiled_anew(tmp_path: Path) -> None:
    source = tmp_path / "cluster" / "scheduler.py"
    source.parent.mkdir()
    source.write_text("x = 1\n")
    before = machine_code.key_of([source.parent])
    assert machine_code.key_of([source.parent]) == before
    source.write_text("x = 2\n")
    assert machine_code.key_of([source.parent]) != before


@pytest.mark.compiled
@pytest.mark.timeout(600)
def test_machine_code_says_the_same_and_passes_the_tests_of_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = machine_code.environment()

    def planned(*more: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "cluster.cli", *FLEET.split(), *more]
        printed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
        assert printed.returncode == 0, printed.stderr
        assert "compiling" not in printed.stderr
        said: dict[str, Any] = json.loads(printed.stdout)
        del said["what_if"]["simulation"]  # how long it took
        return said

    assert planned("--compile") == planned()
    tests = [sys.executable, "-P", "-m", "pytest", "--import-mode=append", *TESTS_OF_ITS_SOURCES]
    subprocess.run([*tests, "-k", f"not {REPLACES_A_METHOD}"], check=True, env=environment, timeout=500)
    asked = [sys.executable, "-P", "-c", "from cluster.planner import machine_code as m; print(m.is_in_use())"]
    assert subprocess.run(asked, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout == "True\n"
