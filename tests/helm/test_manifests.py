"""Every preset renders to objects that Kubernetes accepts."""

import os

import jsonschema
import pytest
import yaml

from cluster.config_file import parse_config
from tests.helm.chart import CHART, PRESETS, Helm
from tests.helm.schemas import check_builtin, check_ray_service, custom_schemas

EVERYTHING = (
    "routes.enabled=true",
    "routes.parentRefs[0].name=edge",
    "routes.httpHostnames[0]=api.example.org",
    "monitoring.podMonitors=true",
    "monitoring.rules=true",
    "security.tls.mode=certManager",
)
CUSTOM = {"RayService", "Certificate", "Issuer", "PodMonitor", "PrometheusRule", "GRPCRoute", "HTTPRoute"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_passes_helms_own_lint(helm: Helm, preset: str) -> None:
    done = helm.run("lint", "--strict", str(CHART), "--values", str(CHART / preset))

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_valid_to_kubernetes(helm: Helm, preset: str) -> None:
    rendered = helm.template(preset=preset)

    for manifest in rendered.manifests:
        if manifest["kind"] not in CUSTOM:
            check_builtin(manifest)
    check_ray_service(rendered.one("RayService"))


@pytest.mark.skipif(
    not os.environ.get("MULL_CRD_DIR"), reason="MULL_CRD_DIR names no folder of CustomResourceDefinitions"
)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_custom_resources_fit_their_definitions(helm: Helm, preset: str) -> None:
    schemas = custom_schemas()
    rendered = helm.template(*EVERYTHING, preset=preset)

    for manifest in rendered.manifests:
        if (schema := schemas.get((manifest["apiVersion"], manifest["kind"]))) is not None:
            jsonschema.validate(manifest, schema)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_configuration_is_one_that_mull_accepts(helm: Helm, preset: str) -> None:
    rendered = helm.template(preset=preset)

    values = rendered.cluster_config
    values["model"].setdefault("path", "/models/built-in")
    config = parse_config(values)

    assert config.engine.layout.world_size * config.router.copies >= 1
    assert yaml.safe_load(rendered.one("ConfigMap", "try-mull")["data"]["mull.yaml"]) == rendered.cluster_config
