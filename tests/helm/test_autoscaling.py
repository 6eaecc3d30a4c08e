"""layout.maxCopies: what Serve and Ray's autoscaler are told, and who may ask Kubernetes for pods."""

from __future__ import annotations

import os
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from cluster.config import ClusterConfig, ModelSource, RouterConfig
from cluster.router.autoscaling import scale_copies
from cluster.router.deployment import autoscaling_options
from tests.helm.chart import Helm, Manifest, Rendered
from tests.helm.schemas import check_builtin, check_ray_service, custom_schemas

TWO_NODES = "values-235b-2-nodes.yaml"
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"


@pytest.fixture(scope="module")
def scaled(helm: Helm) -> Rendered:
    """Copies of two pods of eight GPUs."""
    return helm.template("layout.copies=2", "layout.maxCopies=4", "layout.gpus=64", preset=TWO_NODES)


def cluster_of(rendered: Rendered) -> Manifest:
    cluster: Manifest = rendered.service["rayClusterConfig"]
    return cluster


def router_of(rendered: Rendered) -> dict[str, Any]:
    deployments = ServeDeploySchema.model_validate(rendered.serve_config).applications[0].deployments
    (router,) = (it.model_dump(exclude_unset=True) for it in deployments if it.name == "Router")
    return router


def test_serve_scales_as_it_does_for_mull_serve(scaled: Rendered) -> None:
    router = router_of(scaled)
    flags = RouterConfig(copies=2, max_copies=4)

    scaling = AutoscalingConfig(**router["autoscaling_config"])

    by_flags = autoscaling_options(ClusterConfig(model=ModelSource(path="/m", name="m"), router=flags))
    same = {"min_replicas", "initial_replicas", "max_replicas", "upscale_delay_s", "downscale_delay_s"}
    assert router["num_replicas"] == "auto"
    assert scaling.model_dump(include=same) == by_flags["autoscaling_config"].model_dump(include=same)
    policy = scaling.policy.get_policy()  # Serve's own copy of it
    assert (policy.__module__, policy.__name__) == (scale_copies.__module__, scale_copies.__name__)


def test_delays_are_the_layouts(helm: Helm) -> None:
    rendered = helm.template("layout.maxCopies=2", "layout.upscaleDelayS=5", "layout.downscaleDelayS=50")

    scaling = router_of(rendered)["autoscaling_config"]
    assert (scaling["upscale_delay_s"], scaling["downscale_delay_s"]) == (5, 50)


def test_rays_autoscaler_may_start_the_pods_of_all_copies(scaled: Rendered) -> None:
    cluster = {"metadata": {"name": "try", "namespace": "models"}, "spec": cluster_of(scaled)}

    groups = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]

    ranks, gateway = groups["ranks"], groups["gateway"]
    assert scaled.group("ranks")["replicas"] == ranks["min_workers"] == 4
    assert ranks["max_workers"] == 8
    assert (ranks["resources"]["CPU"], ranks["resources"]["GPU"]) == (9, 8)
    assert gateway["min_workers"] == gateway["max_workers"] == 2
    assert cluster_of(scaled)["enableInTreeAutoscaling"] is True


def test_another_number_of_copies_leaves_those_that_run_as_they_are(helm: Helm, scaled: Rendered) -> None:
    """Serve replaces whatever is built from other arguments."""
    fixed = helm.template("layout.gpus=16", preset=TWO_NODES)

    assert scaled.cluster_config == fixed.cluster_config


def test_only_the_autoscalers_container_may_ask_kubernetes(scaled: Rendered) -> None:
    head = cluster_of(scaled)["headGroupSpec"]["template"]["spec"]
    options = cluster_of(scaled)["autoscalerOptions"]

    accounts = [group["template"]["spec"]["serviceAccountName"] for group in scaled.ray_groups]
    assert accounts == ["try-mull-head", "try-mull", "try-mull"]
    assert scaled.one("ServiceAccount", "try-mull-head")["automountServiceAccountToken"] is False
    assert not any(pod["automountServiceAccountToken"] for pod in scaled.pods)
    (token,) = (mount["name"] for mount in options["volumeMounts"] if mount["mountPath"] == TOKEN)
    assert token not in {mount["name"] for mount in head["containers"][0]["volumeMounts"]}
    assert {mount["name"] for mount in options["volumeMounts"]} <= {volume["name"] for volume in head["volumes"]}
    assert options["securityContext"] == head["containers"][0]["securityContext"]


def test_the_head_alone_reaches_kubernetes_api(helm: Helm) -> None:
    peer = "networkPolicy.apiServer.to[0].ipBlock.cidr=10.0.0.1/32"
    policy = helm.template("layout.maxCopies=2", peer).one("NetworkPolicy", "try-mull-autoscaler")

    assert policy["spec"]["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"
    (out,) = policy["spec"]["egress"]
    assert out["to"] == [{"ipBlock": {"cidr": "10.0.0.1/32"}}]
    assert [port["port"] for port in out["ports"]] == [443, 6443]


def test_a_fixed_number_of_copies_needs_no_rights(helm: Helm) -> None:
    rendered = helm.template("layout.copies=2")

    assert router_of(rendered) == {"name": "Router", "num_replicas": 2}
    assert not {"enableInTreeAutoscaling", "autoscalerOptions"} & set(cluster_of(rendered))
    assert len(rendered.of("ServiceAccount")) == 1
    assert not [it for it in rendered.of("NetworkPolicy") if it["metadata"]["name"].endswith("-autoscaler")]


def test_kubernetes_accepts_it(scaled: Rendered) -> None:
    for kind in ("NetworkPolicy", "ServiceAccount", "PodDisruptionBudget"):
        for manifest in scaled.of(kind):
            check_builtin(manifest)
    check_ray_service(scaled.one("RayService"))


@pytest.mark.skipif(
    not os.environ.get("MULL_CRD_DIR"), reason="MULL_CRD_DIR names no folder of CustomResourceDefinitions"
)
def test_it_fits_kuberays_definition(scaled: Rendered) -> None:
    jsonschema.validate(scaled.one("RayService"), custom_schemas()["ray.io/v1", "RayService"])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (["layout.copies=2", "layout.maxCopies=1"], "layout.maxCopies 1 is below layout.copies 2; raise it"),
        (["layout.maxCopies=2", "layout.gpus=16"], "layout.gpus is 16, but maxCopies 2 * tp 4 * dp 4 needs 32"),
        (["config.router.max_copies=2"], "additional properties 'max_copies' not allowed"),
    ],
)
def test_a_contradiction_is_a_sentence(helm: Helm, values: list[str], sentence: str) -> None:
    assert sentence in helm.refusal(*values, preset=TWO_NODES)
