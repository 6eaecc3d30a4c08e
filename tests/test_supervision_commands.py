"""`mull check` and the start of a Serve application: what is wrong is one line, before anything runs."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.app import build
from cluster.cli import main
from cluster.errors import ConfigError, EngineError
from cluster.readiness import wait_until_ready
from mull.v1 import generation_pb2 as pb
from mull.v1 import router_pb2


def config_file(folder: Path, text: str) -> str:
    file = folder / "mull.yaml"
    file.write_text(text)
    return str(file)


def test_a_configuration_that_could_be_served_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config_file(tmp_path, "model: {name: small}\nengine: {tp: 2}\n")

    assert main(["check", "--config", file]) == 0
    assert "can be served with tp 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {path: /nowhere, name: x}\n", "/nowhere: no such model directory"),
        ("engine: {tp: 2, tq: 1}\n", "engine.tq"),
        ("engine: {tp: 7}\n", "cannot split this"),
        ("security: {keys_file: /nowhere/keys.yaml}\n", "/nowhere/keys.yaml"),
        ("security: {tls_cert: /nowhere/tls.crt, tls_key: /nowhere/tls.key}\n", "/nowhere/tls.crt"),
    ],
)
def test_what_could_not_be_served_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    code = main(["check", "--config", config_file(tmp_path, text)])

    said = capsys.readouterr().err
    assert code != 0
    assert words in said
    assert said.count("\n") == 1


def test_ranks_need_not_see_the_keys(tmp_path: Path) -> None:
    file = config_file(tmp_path, "security: {keys_file: /nowhere/keys.yaml}\n")

    assert main(["check", "--config", file, "--only-model"]) == 0


def test_a_checkpoint_that_is_being_downloaded_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    file = config_file(tmp_path, f"model: {{path: {model}, name: x}}\n")

    assert main(["check", "--config", file, "--wait-s", "0.05"]) != 0
    assert "has not appeared within 0.05 s; look at the job" in capsys.readouterr().err
    # It is there, so that the wait ends, and is empty, so that the check does not pass.
    threading.Timer(0.05, model.mkdir).start()
    assert main(["check", "--config", file, "--wait-s", "30"]) != 0
    assert "has not appeared" not in capsys.readouterr().err


def test_a_serve_config_with_a_wrong_value_builds_nothing() -> None:
    with pytest.raises(ConfigError, match=r"engine\.tp"):
        build({"engine": {"tp": 0}})


def gateway_that_says(*infos: pb.GetServerInfoResponse) -> Any:
    """A handle whose info() gives these, one after the other."""
    left = list(infos)

    async def answer() -> bytes:
        return left.pop(0).SerializeToString()

    return SimpleNamespace(info=SimpleNamespace(remote=answer))


async def test_an_application_has_started_when_it_can_take_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.readiness._POLL_S", 0.0)
    loading = pb.GetServerInfoResponse(ready=False, reason="loading", routers=[router_pb2.DescribeResponse()])
    gateway = gateway_that_says(pb.GetServerInfoResponse(ready=False), loading, pb.GetServerInfoResponse(ready=True))

    await wait_until_ready(60.0, gateway)


async def test_a_router_that_has_given_up_is_the_reason_why_it_does_not_start() -> None:
    failed = router_pb2.DescribeResponse(failed=True, reason="no space")
    gateway = gateway_that_says(pb.GetServerInfoResponse(ready=False, reason="no space", routers=[failed]))

    with pytest.raises(EngineError, match="no space"):
        await wait_until_ready(60.0, gateway)


def test_no_command_but_plan_imports_the_planner() -> None:
    code = (
        "import sys, cluster.cli as cli; cli._parser().parse_args(['status']); print('cluster.planner' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"
