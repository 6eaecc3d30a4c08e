"""The wheel holds everything that an installation without a clone needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("cluster", "workers", "proto", "deploy/models/pocket", "pyproject.toml", "README.md", "LICENSE")


def build_wheel(place: Path) -> Path:
    """Build from a copy, so that nothing is left in the source tree."""
    for part in PARTS:
        source, target = ROOT / part, place / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((place / "dist").glob("mull-*.whl"))


@pytest.mark.timeout(300)
def test_an_installed_wheel_has_the_protocol_and_finds_the_built_in_model(tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(build_wheel(tmp_path / "source")) as wheel:
        wheel.extractall(installed)

    code = "import mull.v1.generation_pb2; from cluster.flags import builtin_model; print(builtin_model())"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    model = Path(done.stdout.strip())
    assert model == installed / "mull" / "pocket"
    assert {file.name for file in model.iterdir()} >= {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert list(model.glob("*.safetensors"))
    assert (installed / "mull" / "v1" / "generation.proto").is_file()
    assert (installed / "cluster" / "py.typed").is_file()
    planner = installed / "cluster" / "planner"
    assert {file.name for file in (planner / "report").iterdir()} >= {"report.html", "report.css"}
    assert list(planner.glob("data/*.toml"))
    assert list(planner.glob("data/models/*.json"))
