"""What Kubernetes would accept: its own schemas, strictly, and for custom resources their definitions or a frame.

The frame of RayService knows the fields that the chart uses and no others; the pods inside are checked as pods.
With MULL_CRD_DIR naming a folder of CustomResourceDefinitions, such as KubeRay's, their schemas are used as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.helm.chart import Manifest

KUBERNETES_VERSIONS = ("1.29", "1.37")


def _closed(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_OBJECT = {"type": "object"}
_METADATA = _closed("name labels", name={"type": "string", "maxLength": 41}, labels=_TEXTS)
_HEAD = _closed("rayStartParams template", rayStartParams=_TEXTS, resources=_TEXTS, template=_OBJECT)
_WORKERS = _closed(
    "groupName replicas minReplicas maxReplicas rayStartParams template",
    groupName=_TEXT,
    replicas=_COUNT,
    minReplicas=_COUNT,
    maxReplicas=_COUNT,
    resources=_TEXTS,
    rayStartParams=_TEXTS,
    template=_OBJECT,
)
_AUTOSCALER = _closed(
    "version idleTimeoutSeconds",
    version={"enum": ["v1", "v2"]},
    idleTimeoutSeconds=_COUNT,
    imagePullPolicy=_TEXT,
    env={"type": "array"},
    resources=_OBJECT,
    securityContext=_OBJECT,
    volumeMounts={"type": "array"},
)
_RAY_CLUSTER = _closed(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion=_TEXT,
    authOptions=_closed("mode", mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=_AUTOSCALER,
    headGroupSpec=_HEAD,
    workerGroupSpecs={"type": "array", "items": _WORKERS},
)
RAY_SERVICE = _closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=_METADATA,
    spec=_closed(
        "serveConfigV2 rayClusterConfig",
        upgradeStrategy=_closed("type", type={"enum": ["NewCluster", "None"]}),
        rayClusterDeletionDelaySeconds=_COUNT,
        excludeHeadPodFromServeSvc={"type": "boolean"},
        serveService=_OBJECT,
        serveConfigV2=_TEXT,
        rayClusterConfig=_RAY_CLUSTER,
    ),
)


def check_builtin(manifest: Manifest) -> None:
    """Raises where a Kubernetes of the oldest or the newest version would refuse it."""
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def check_ray_service(manifest: Manifest) -> None:
    """The frame, and the objects within."""
    jsonschema.validate(manifest, RAY_SERVICE)
    spec = manifest["spec"]
    check_builtin({"apiVersion": "v1", "kind": "Service", **spec["serveService"]})
    cluster = spec["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        check_builtin({"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]})


@cache
def custom_schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """(apiVersion, kind) to schema, of the definitions in MULL_CRD_DIR; nothing where it is not set."""
    folder = os.environ.get("MULL_CRD_DIR")
    if folder is None:
        return {}
    return {key: schema for file in sorted(Path(folder).glob("*.yaml")) for key, schema in _definitions(file)}


def _definitions(file: Path) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    for definition in yaml.load_all(file.read_text(), yaml.CSafeLoader):
        if not definition or definition["kind"] != "CustomResourceDefinition":
            continue
        spec = definition["spec"]
        for version in spec["versions"]:
            key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            yield key, _strict(version["schema"]["openAPIV3Schema"])


def _strict(schema: Any) -> Any:
    """Unknown fields are errors, as `kubectl --validate=strict` has it; patterns that only Go reads are left out."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: _strict(value) for name, value in schema.items() if name != "pattern" or _is_readable(value)}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        inner["additionalProperties"] = False
    return inner


def _is_readable(pattern: Any) -> bool:
    """Whether Python knows this regular expression; what is no text is a field with that name."""
    if not isinstance(pattern, str):
        return True
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
