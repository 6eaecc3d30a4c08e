"""What the pods may do, when they are ready, and how they end."""

from __future__ import annotations

import pytest

from cluster.cli import _parser
from tests.helm.chart import PRESETS, Helm, Manifest

BIG = "values-235b-2-nodes.yaml"


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", []), *pod["containers"]]


@pytest.mark.parametrize("preset", PRESETS)
def test_no_pod_has_rights_or_writes_to_its_image(helm: Helm, preset: str) -> None:
    for pod in helm.template(preset=preset).pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"]["drop"] == ["ALL"]
            assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_mounted_is_there_and_what_is_there_is_mounted(helm: Helm, preset: str) -> None:
    for pod in helm.template(preset=preset).pods:
        mounted = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_command_is_one_that_mull_has(helm: Helm, preset: str) -> None:
    commands = [
        command
        for pod in helm.template(preset=preset).pods
        for container in containers(pod)
        for command in (
            container.get("command", []),
            container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", []),
        )
        if command and command[0] == "mull"
    ]

    assert {command[1] for command in commands} == {"check", "drain", "chat"}
    for command in commands:
        _parser().parse_args(command[1:])  # exits where a flag is unknown


def test_a_pod_without_a_gateway_is_ready_when_ray_is(helm: Helm) -> None:
    """KubeRay would else look for a Serve proxy, which no pod has."""
    rendered = helm.template(preset=BIG)

    for group in rendered.ray_groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        if group.get("groupName") != "gateway":
            assert container["readinessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}


def test_a_gateway_is_ready_when_it_can_take_work_whatever_its_ports_ask_for(helm: Helm) -> None:
    rendered = helm.template(preset=BIG)

    (container,) = rendered.group("gateway")["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "mull-metrics"}
    assert ports["mull-metrics"] == rendered.cluster_config["gateway"]["metrics_port"]


def test_no_connection_gets_a_gateways_port(helm: Helm) -> None:
    pod = helm.template("gateway.ports.grpc=40000").group("gateway")["template"]["spec"]

    assert pod["securityContext"]["sysctls"] == [
        {"name": "net.ipv4.ip_local_reserved_ports", "value": "40000,8000,9464"}
    ]


def test_a_gateways_pod_has_the_time_that_its_streams_have(helm: Helm) -> None:
    rendered = helm.template("config.gateway.drain_s=1000")

    assert rendered.group("gateway")["template"]["spec"]["terminationGracePeriodSeconds"] == 1030
    assert rendered.service["rayClusterDeletionDelaySeconds"] == 1030


def test_gateways_and_ranks_get_the_resources_that_place_them(helm: Helm) -> None:
    rendered = helm.template("gateway.replicas=3")

    group = rendered.group("gateway")
    assert (group["replicas"], rendered.replicas["Gateway"]) == (3, 3)
    assert group["resources"] == {"CPU": "0", rendered.cluster_config["gateway"]["node_resource"]: "1"}
    assert rendered.ray_groups[0]["resources"] == {"CPU": "0"}


def test_memory_may_be_locked_only_for_rdma(helm: Helm) -> None:
    with_rdma = helm.template(preset=BIG).group("ranks")["template"]["spec"]["containers"][0]
    without = helm.template(preset="values-235b-8xh200.yaml").group("ranks")["template"]["spec"]["containers"][0]

    assert with_rdma["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert with_rdma["resources"]["limits"]["rdma/ib"] == "8"
    assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in with_rdma["env"]
    assert without["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_pods_go_where_the_values_say(helm: Helm) -> None:
    rendered = helm.template(
        "ranks.pod.nodeSelector.gpu=h200",
        "ranks.pod.priorityClassName=high",
        "ranks.pod.tolerations[0].key=gpu",
        "ranks.pod.tolerations[0].operator=Exists",
        "ranks.pod.spread=DoNotSchedule",
    )

    pod = rendered.group("ranks")["template"]["spec"]
    assert pod["nodeSelector"] == {"gpu": "h200"}
    assert pod["priorityClassName"] == "high"
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod["topologySpreadConstraints"][0]["whenUnsatisfiable"] == "DoNotSchedule"
    assert "nodeSelector" not in rendered.group("gateway")["template"]["spec"]


def test_a_download_is_waited_for_and_seen_read_only(helm: Helm) -> None:
    rendered = helm.template(preset=BIG)

    (job,) = rendered.of("Job")
    environment = {it["name"]: it["value"] for it in job["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment["TARGET"] == rendered.cluster_config["model"]["path"]
    for name in ("gateway", "ranks"):
        pod = rendered.group(name)["template"]["spec"]
        (check,) = pod["initContainers"]
        assert check["command"][-2:] == ["--wait-s", "21600"]
        mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["model"]["readOnly"] is True


def test_another_pod_is_another_download_as_jobs_cannot_be_changed(helm: Helm) -> None:
    changes = (
        "model.download.revision=v2",
        "model.claimName=mine",
        "image.tag=next",
        "image.pullPolicy=Always",
        "serviceAccount.name=mine",
    )

    names = [helm.template(*values, preset=BIG).one("Job")["metadata"]["name"] for values in [(), *zip(changes)]]
    again = helm.template("gateway.replicas=5", preset=BIG).one("Job")["metadata"]["name"]
    assert len(set(names)) == len(changes) + 1
    assert again == names[0]


def test_variables_reach_the_processes_that_they_are_for(helm: Helm) -> None:
    rendered = helm.template("gateway.env.OTEL_EXPORTER_OTLP_HEADERS=key=a", "ranks.env.NCCL_DEBUG=INFO")

    gateway, ranks = (rendered.group(name)["template"]["spec"]["containers"][0]["env"] for name in ("gateway", "ranks"))
    header, debug = {"name": "OTEL_EXPORTER_OTLP_HEADERS", "value": "key=a"}, {"name": "NCCL_DEBUG", "value": "INFO"}
    assert [header in gateway, debug in gateway, header in ranks, debug in ranks] == [True, False, False, True]


def test_log_lines_of_mulls_processes_are_json_in_the_pods_own_log(helm: Helm) -> None:
    rendered = helm.template()

    assert rendered.cluster_config["logs"] == {"format": "json"}
    for name in ("gateway", "ranks"):
        container = rendered.group(name)["template"]["spec"]["containers"][0]
        assert {"name": "RAY_LOG_TO_STDERR", "value": "1"} in container["env"]
