"""The compose file cannot be run in a test; it can be walked: what it mounts, opens, starts and pins."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ClusterConfig, GatewayConfig, RouterConfig
from cluster.flags import add_serve_flags, config_from_flags

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MONITORING = DEPLOY / "monitoring"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]

WHERE_THEY_READ = {
    "prometheus": ["/etc/prometheus/prometheus.yaml", "/etc/prometheus/rules"],
    "alertmanager": ["/etc/alertmanager/alertmanager.yaml"],
    "grafana": [
        "/etc/grafana/provisioning/datasources/mull.yaml",
        "/etc/grafana/provisioning/dashboards/mull.yaml",
        "/var/lib/grafana/dashboards",
    ],
}


def read(file: str) -> Any:
    return yaml.safe_load((MONITORING / file).read_text())


def mounts(service: str) -> dict[str, Path]:
    """Place in the container to file or folder of this tree."""
    parts = [volume.split(":") for volume in SERVICES[service].get("volumes", [])]
    return {part[1]: (DEPLOY / part[0]).resolve() for part in parts if part[0].startswith(".")}


def served_config() -> ClusterConfig:
    """What the command of the container says."""
    command, *flags = SERVICES["mull"]["command"]
    assert command == "serve"
    parser = argparse.ArgumentParser()
    add_serve_flags(parser, fallbacks={})
    return config_from_flags(parser.parse_args(flags))


@pytest.mark.parametrize("service", sorted(WHERE_THEY_READ))
def test_what_is_mounted_is_here_and_lies_where_it_is_read(service: str) -> None:
    assert list(mounts(service)) == WHERE_THEY_READ[service]
    assert all(source.exists() for source in mounts(service).values())
    assert all(volume.endswith(":ro") for volume in SERVICES[service]["volumes"] if volume.startswith("."))


def test_images_are_pinned_and_ours_is_the_one_of_the_dockerfile() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    build = SERVICES["mull"]["build"]

    assert all(re.search(r":v?\d+\.\d+\.\d+$", service["image"]) for service in SERVICES.values())
    assert SERVICES["mull"]["image"] == f"mull:{version}"
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert f"AS {build['target']}\n" in (DEPLOY / "Dockerfile").read_text()


def test_grafanas_image_is_the_one_that_the_dashboards_are_made_for() -> None:
    (pin,) = re.findall(r"^grafana-foundation-sdk==\d+!(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

    assert SERVICES["grafana"]["image"] == f"grafana/grafana:{pin}"


def test_the_command_is_one_that_mull_accepts() -> None:
    config = served_config()

    assert config.security.insecure
    assert config.gateway.host == "0.0.0.0"
    assert config.engine.layout.world_size > 1


def test_prometheus_reads_both_metrics_ports() -> None:
    config = served_config()
    (job,) = read("prometheus.yaml")["scrape_configs"]
    (scraped,) = job["static_configs"]

    assert scraped["targets"] == [f"mull:{config.gateway.metrics_port}", f"mull:{config.router.metrics_port}"]
    assert config.router.copies == 1
    assert (config.gateway.metrics_port, config.router.metrics_port) == (
        GatewayConfig().metrics_port,
        RouterConfig().metrics_port,
    )


def test_every_address_leads_to_a_service_at_its_port() -> None:
    (alertmanagers,) = read("prometheus.yaml")["alerting"]["alertmanagers"]
    addresses = [*alertmanagers["static_configs"][0]["targets"]]
    addresses += [source["url"].removeprefix("http://") for source in read("grafana/datasources.yaml")["datasources"]]

    assert addresses == ["alertmanager:9093", "prometheus:9090"]
    for name, port in (address.split(":") for address in addresses):
        assert f"127.0.0.1:{port}:{port}" in SERVICES[name]["ports"]


def test_ports_are_open_to_this_machine_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    config = served_config().gateway

    assert all(port.startswith("127.0.0.1:") for port in ports)
    for port in (config.grpc_port, config.http_port):
        assert f"127.0.0.1:{port}:{port}" in SERVICES["mull"]["ports"]


def test_rules_and_dashboards_are_those_of_the_chart() -> None:
    chart = ROOT / "helm" / "mull"
    (provider,) = read("grafana/dashboards.yaml")["providers"]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])

    assert mounts("prometheus")["/etc/prometheus/rules"] == chart / "rules"
    assert read("prometheus.yaml")["rule_files"] == ["/etc/prometheus/rules/*.yaml"]
    assert mounts("grafana")[provider["options"]["path"]] == chart / "dashboards"
    assert json.loads((chart / "dashboards" / home.name).read_text())["uid"] == "mull-service"


@pytest.mark.parametrize(
    "check", [("promtool", "check", "config", "prometheus.yaml"), ("amtool", "check-config", "alertmanager.yaml")]
)
def test_the_configurations_pass_their_programs_own_check(check: tuple[str, ...]) -> None:
    if shutil.which(check[0]) is None:
        pytest.skip(f"{check[0]} is missing: apt-get install prometheus prometheus-alertmanager")
    done = subprocess.run(check, cwd=MONITORING, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


def test_what_silences_an_alert_is_an_alert() -> None:
    rules = yaml.safe_load((ROOT / "helm" / "mull" / "rules" / "alerts.yaml").read_text())
    known = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}

    for rule in read("alertmanager.yaml")["inhibit_rules"]:
        (source,) = rule["source_matchers"]
        (target,) = rule["target_matchers"]
        pattern = target.split("=")[-1].strip('~ "')
        assert source.split(" = ")[1] in known
        assert any(re.fullmatch(pattern, name) for name in known), pattern
