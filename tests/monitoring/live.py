"""A real Prometheus and a real Alertmanager, as the compose file configures them: on free ports, always ended."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.ports import HeldPorts

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
RULES = sorted((ROOT / "helm" / "mull" / "rules").glob("*.yaml"))
PROGRAMS = ("prometheus", "prometheus-alertmanager")

INTERVAL = "500ms"
SCRAPE_INTERVAL = "1s"
"""The time for an answer, too: the cores are busy with those who ask and are asked."""
START_S = 60.0
STOP_S = 20.0
ANSWER_S = 60.0


@dataclass(frozen=True)
class Watch:
    """Both, running."""

    prometheus: httpx.Client
    alertmanager: httpx.Client

    def values(self, expr: str) -> list[float]:
        """One of each series that an expression has now. Raises ValueError where Prometheus refuses it."""
        answer = self.prometheus.get("/api/v1/query", params={"query": expr})
        if answer.status_code != 200:
            raise ValueError(f"{expr}\n{answer.text}")
        return [float(series["value"][1]) for series in answer.json()["data"]["result"]]

    def has_data(self, expr: str) -> bool:
        return any(not math.isnan(value) for value in self.values(expr))

    def alerts(self, name: str) -> list[dict[str, Any]]:
        """Those that Alertmanager has got."""
        answer = self.alertmanager.get("/api/v2/alerts", params={"filter": f'alertname="{name}"'})
        found: list[dict[str, Any]] = answer.raise_for_status().json()
        return found


@contextmanager
def watching(targets: Sequence[str], directory: Path) -> Iterator[Watch]:
    """Prometheus reads `targets` and sends alerts to an Alertmanager. Files go to `directory`."""
    with HeldPorts() as ports, _watching(targets, directory, ports) as watch:
        yield watch


@contextmanager
def _watching(targets: Sequence[str], directory: Path, ports: HeldPorts) -> Iterator[Watch]:
    prometheus_at, alertmanager_at = (f"127.0.0.1:{ports.hold('127.0.0.1')}" for _ in range(2))
    prometheus = [
        "prometheus",
        f"--config.file={_config(targets, alertmanager_at, directory)}",
        f"--storage.tsdb.path={directory / 'series'}",
        f"--web.listen-address={prometheus_at}",
    ]
    alertmanager = [
        "prometheus-alertmanager",
        f"--config.file={MONITORING / 'alertmanager.yaml'}",
        f"--storage.path={directory / 'alerts'}",
        f"--web.listen-address={alertmanager_at}",
        "--cluster.listen-address=",
    ]
    with ExitStack() as stack:
        for command in (prometheus, alertmanager):
            stack.enter_context(_running(command, directory / f"{command[0]}.log"))
        clients = [
            stack.enter_context(httpx.Client(base_url=f"http://{at}", timeout=ANSWER_S))
            for at in (prometheus_at, alertmanager_at)
        ]
        until(lambda: all(map(_is_ready, clients)), START_S, "Prometheus or Alertmanager is not ready")
        yield Watch(*clients)


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Raises AssertionError."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"after {timeout_s:g} s: {what}"
        time.sleep(0.2)


def _config(targets: Sequence[str], alertmanager: str, directory: Path) -> Path:
    """The compose file's, with other addresses and with less patience: so have its rules."""
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {
        "scrape_interval": SCRAPE_INTERVAL,
        "scrape_timeout": SCRAPE_INTERVAL,
        "evaluation_interval": INTERVAL,
    }
    config["scrape_configs"][0]["static_configs"][0]["targets"] = list(targets)
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    config["rule_files"] = [str(directory / file.name) for file in RULES]
    for file in RULES:
        rules = yaml.safe_load(file.read_text())
        for group in rules["groups"]:
            for rule in group["rules"]:
                rule.pop("for", None)
        (directory / file.name).write_text(yaml.safe_dump(rules))
    written = directory / "prometheus.yaml"
    written.write_text(yaml.safe_dump(config))
    return written


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
