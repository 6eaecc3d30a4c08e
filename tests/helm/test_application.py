"""The application that a pod would run: the rendered Serve config, in Serve's own schema, started here."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client, _set_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from cluster.ports import HeldPorts
from mull.client import Client
from tests.helm.chart import PRESETS, Helm, Rendered
from tests.own_ray import own_ray

pytestmark = pytest.mark.timeout(300)

START_S = 120.0
APP = "mull"


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_serve_config_fits_serves_schema(helm: Helm, preset: str) -> None:
    config = helm.template(preset=preset).serve_config

    parsed = ServeDeploySchema.model_validate(config)

    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert parsed.proxy_location is ProxyLocation.Disabled
    assert [app.import_path for app in parsed.applications] == ["cluster.app:build"]


@pytest.fixture
def pocket(helm: Helm) -> Iterator[Rendered]:
    with HeldPorts() as held:
        yield _pocket(helm, [held.hold("127.0.0.1") for _ in range(4)])


def _pocket(helm: Helm, free_ports: list[int]) -> Rendered:
    *gateway_ports, router_port = free_ports
    ports = [
        f"gateway.ports.{name}={port}" for name, port in zip(("grpc", "http", "metrics"), gateway_ports, strict=True)
    ]
    ports.append(f"ranks.ports.metrics={router_port}")
    return helm.template(*ports, "config.engine.kv_memory_bytes=16777216", "layout.tp=1", "layout.maxCopies=2")


@pytest.fixture
def ray_like_the_pods(pocket: Rendered) -> Iterator[None]:
    """One node with what the pods of the cluster offer together."""
    offered: dict[str, float] = {}
    for group in pocket.ray_groups:
        for name, quantity in group["resources"].items():
            offered[name] = offered.get(name, 0) + float(quantity) * group.get("replicas", 1)
    try:
        with own_ray(int(offered.pop("CPU")), offered):
            serve.start(proxy_location=ProxyLocation.Disabled)
            yield
    finally:
        # The gateway has drained, so that Ray's end is enough; Serve's client would look for its cluster.
        _set_global_client(None)


@pytest.mark.usefixtures("ray_like_the_pods")
def test_the_application_that_kubernetes_would_run_answers_and_drains(pocket: Rendered) -> None:
    # given: the same config that KubeRay would put to Ray's dashboard
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(pocket.serve_config))
    # when: Serve calls it running
    _wait_until_running()
    # then: it can take work at once
    ports: dict[str, int] = pocket.cluster_config["gateway"]
    with Client(f"127.0.0.1:{ports['grpc_port']}") as client:
        assert client.server_info().ready
        assert "632" in client.chat("What is 347 + 285?", temperature=0).answer
    # and the hook before a pod's end leaves nothing behind that listens
    hook = pocket.group("gateway")["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    done = subprocess.run(_here(hook), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "drained\n"), done.stderr
    assert not _listens(ports["grpc_port"])
    assert not _listens(ports["http_port"])


def _here(command: list[str]) -> list[str]:
    """The command of a pod, with the interpreter of this test and without the wait for Kubernetes' Services."""
    program, *args = command
    assert program == "mull"
    delay = args.index("--delay-s")
    return [sys.executable, "-m", "cluster.cli", *args[:delay], *args[delay + 2 :]]


def _wait_until_running() -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        state = serve.status().applications.get(APP)
        if state is not None and state.status is ApplicationStatus.RUNNING:
            return
        assert state is None or state.status is not ApplicationStatus.DEPLOY_FAILED, state.message
        time.sleep(0.2)
    raise AssertionError(f"not running within {START_S:g} s: {serve.status()}")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
