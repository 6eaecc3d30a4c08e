"""Makes what follows from helm/mull/values.yaml: docs/values.md, and values.schema.json, which rejects typos.

The schema of `config` comes from ClusterConfig itself. `python helm/generate.py`, with --check only a comparison.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config import ClusterConfig
from cluster.metrics.buckets import LONG_S

ROOT = Path(__file__).parent.parent
VALUES = ROOT / "helm" / "mull" / "values.yaml"
SCHEMA = ROOT / "helm" / "mull" / "values.schema.json"
PAGE = ROOT / "docs" / "values.md"

FROM_LAYOUT = {
    "engine": ("tp", "dp", "expert_tp", "redundant_experts", "device", "threads_per_rank"),
    "router": ("copies", "max_copies", "upscale_delay_s", "downscale_delay_s", "ray_address", "metrics_port"),
    "gateway": ("replicas", "node_resource", "host", "grpc_port", "http_port", "metrics_port", "metrics_host"),
    "logs": (),
    "tracing": (),
}
"""Fields of ClusterConfig that the chart fills in."""

Schema = dict[str, Any]

_TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_ENVIRONMENT: Schema = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
_OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
_TEXT_LIST: Schema = {"type": "array", "items": {"type": "string"}}
_POSITIVE: Schema = {"type": "integer", "minimum": 1}
_PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
_SHARE: Schema = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
_LATE_AFTER_S: Schema = {"enum": [bound for bound in LONG_S if bound >= 0.5]}
"""Bounds of the histograms: between them nobody knows who was late."""
_RESOURCES: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {part: {"type": "object"} for part in ("requests", "limits")},
}
_POD: Schema = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "nodeSelector": _TEXTS,
        "tolerations": _OBJECTS,
        "affinity": {"type": "object"},
        "priorityClassName": {"type": "string"},
        "annotations": _TEXTS,
        "spread": {"enum": ["DoNotSchedule", "ScheduleAnyway"]},
    },
}
SPECIAL: dict[str, Schema] = {
    "fullnameOverride": {"type": "string", "maxLength": 40},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "image.pullSecrets": _TEXT_LIST,
    "layout.device": {"enum": ["cpu", "cuda"]},
    "layout.redundantExperts": {"type": "integer", "minimum": 0},
    "layout.gpus": {"type": ["integer", "null"], "minimum": 1},
    "layout.maxCopies": {"type": ["integer", "null"], "minimum": 1},
    "model.source": {"enum": ["builtin", "pvc", "hostPath", "huggingface", "s3"]},
    "model.claimName": {"type": ["string", "null"]},
    "model.download.storageClassName": {"type": ["string", "null"]},
    "model.download.accessMode": {"enum": ["ReadWriteOnce", "ReadWriteOncePod", "ReadOnlyMany", "ReadWriteMany"]},
    "security.tls.mode": {"enum": ["none", "existing", "certManager"]},
    "security.tls.issuerRef": {
        "type": "object",
        "additionalProperties": False,
        "properties": {"name": {"type": "string"}, "kind": {"enum": ["Issuer", "ClusterIssuer"]}},
    },
    "security.tls.dnsNames": _TEXT_LIST,
    "gateway.ports": {
        "type": "object",
        "additionalProperties": False,
        "properties": dict.fromkeys(("grpc", "http", "metrics"), _PORT),
    },
    "gateway.resources": _RESOURCES,
    "gateway.service.type": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    "gateway.service.annotations": _TEXTS,
    "gateway.pod": _POD,
    "gateway.env": _ENVIRONMENT,
    "ranks.ports": {"type": "object", "additionalProperties": False, "properties": {"metrics": _PORT}},
    "ranks.extraResources": {"type": "object", "additionalProperties": {"type": ["integer", "string"]}},
    "ranks.env": _ENVIRONMENT,
    "ranks.pod": _POD,
    "head.resources": _RESOURCES,
    "head.autoscalerResources": _RESOURCES,
    "head.pod": _POD,
    "ray.auth": {"enum": ["token", "disabled"]},
    "ray.upgrade": {"enum": ["NewCluster", "None"]},
    "serviceAccount.annotations": _TEXTS,
    "networkPolicy.clients": _OBJECTS,
    "networkPolicy.monitoring": _OBJECTS,
    "networkPolicy.operator": _OBJECTS,
    "networkPolicy.dns": _OBJECTS,
    "networkPolicy.collector": _OBJECTS,
    "networkPolicy.apiServer": {
        "type": "object",
        "additionalProperties": False,
        "properties": {"to": _OBJECTS, "ports": {"type": "array", "items": _PORT, "minItems": 1}},
    },
    "routes.parentRefs": _OBJECTS,
    "routes.grpcHostnames": _TEXT_LIST,
    "routes.httpHostnames": _TEXT_LIST,
    "monitoring.labels": _TEXTS,
    "monitoring.dashboardLabels": _TEXTS,
    "monitoring.objectives.failed": _SHARE,
    "monitoring.objectives.firstTokenSeconds": _LATE_AFTER_S,
    "monitoring.objectives.firstTokenLate": _SHARE,
    "monitoring.objectives.firstAnswerSeconds": _LATE_AFTER_S,
    "monitoring.objectives.firstAnswerLate": _SHARE,
}
"""Settings whose default does not tell what they may be."""


@dataclass(frozen=True)
class Setting:
    """A line of values.yaml with its comment."""

    path: str
    meaning: str
    default: Any


def settings(text: str) -> Iterator[Setting]:
    """Raises ValueError for a setting without a `# --` comment."""
    values = yaml.safe_load(text)
    parents: list[str] = []
    meaning: str | None = None
    for line in text.splitlines():
        if (comment := re.fullmatch(r" *# -- (.*)", line)) is not None:
            meaning = comment[1]
        elif (key := re.match(r"( *)([A-Za-z]\w*):(.*)", line)) is not None:
            parents = [*parents[: len(key[1]) // 2], key[2]]
            path = ".".join(parents)
            is_leaf = bool(key[3]) or not _is_section(_at(values, parents))
            if meaning is not None:
                yield Setting(path, meaning, _at(values, parents))
            elif is_leaf and not _is_inside_one(path):
                raise ValueError(f"{path} has no comment that begins with `# --`")
            meaning = None


def _is_inside_one(path: str) -> bool:
    """Whether it is a line of a setting that is explained as a whole."""
    return path.startswith("config.") or any(path.startswith(f"{known}.") for known in SPECIAL)


def _at(values: Any, path: list[str]) -> Any:
    for name in path:
        values = values[name]
    return values


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def page(text: str) -> str:
    """docs/values.md."""
    rows = [
        f"| `{it.path}` | `{json.dumps(it.default)}` | {it.meaning.replace('|', chr(92) + '|')} |"
        for it in settings(text)
    ]
    head = [
        "# Values of the Helm chart",
        "",
        "Made from `helm/mull/values.yaml` by `make chart`. How to install: [kubernetes.md](kubernetes.md).",
        "",
        "| setting | default | meaning |",
        "|---|---|---|",
    ]
    return "\n".join(head + rows) + "\n"


def schema(text: str) -> Schema:
    """values.schema.json: the shape of values.yaml, closed."""
    values = yaml.safe_load(text)
    shape = _closed("", {name: value for name, value in values.items() if name != "config"})
    definitions, parts = _config_parts()
    shape["properties"]["config"] = {"type": "object", "additionalProperties": False, "properties": parts}
    # Helm gives it to the charts below this one, and a chart above may set it.
    shape["properties"]["global"] = {"type": "object"}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **shape, "definitions": definitions}


def _closed(path: str, values: dict[str, Any]) -> Schema:
    inner = {name: _shape(f"{path}.{name}".lstrip("."), value) for name, value in values.items()}
    return {"type": "object", "additionalProperties": False, "properties": inner}


def _shape(path: str, value: Any) -> Schema:
    if path in SPECIAL:
        return SPECIAL[path]
    if _is_section(value):
        return _closed(path, value)
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return _POSITIVE
    if isinstance(value, str):
        return {"type": "string"}
    raise ValueError(f"{path}: its default {value!r} does not tell what it may be; add it to SPECIAL")


def _config_parts() -> tuple[Schema, Schema]:
    """(definitions, properties of `config`) from ClusterConfig, without what the chart fills in."""
    whole = json.loads(json.dumps(ClusterConfig.model_json_schema()).replace("#/$defs/", "#/definitions/"))
    parts = {}
    for part, filled in FROM_LAYOUT.items():
        name = whole["properties"][part]["$ref"].rpartition("/")[2] if "$ref" in whole["properties"][part] else None
        found = whole["$defs"].pop(name or f"{part.capitalize()}Config")
        found["properties"] = {field: it for field, it in found["properties"].items() if field not in filled}
        parts[part] = _without_defaults(found)
    # The chart's own check says more than "got string, want null".
    parts["tracing"]["properties"]["otlp_endpoint"] = {"type": ["string", "null"]}
    used = json.dumps(parts)
    kept = {name: it for name, it in whole["$defs"].items() if f"#/definitions/{name}" in used}
    return {name: _without_defaults(it) for name, it in kept.items()}, parts


def _without_defaults(value: Any) -> Any:
    """Titles and defaults are for readers of the code; a default beside a $ref confuses validators."""
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: _without_defaults(it) for name, it in value.items() if not _is_remark(name, it)}


def _is_remark(name: str, value: Any) -> bool:
    return name == "default" or (name in ("title", "description") and isinstance(value, str))


def main() -> int:
    text = VALUES.read_text()
    made = {PAGE: page(text), SCHEMA: json.dumps(schema(text), indent=1) + "\n"}
    stale = [file for file, content in made.items() if not file.exists() or file.read_text() != content]
    if "--check" in sys.argv[1:]:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is not what helm/mull/values.yaml says; run `make chart`", file=sys.stderr)
        return 1 if stale else 0
    for file in stale:
        file.write_text(made[file])
    return 0


if __name__ == "__main__":
    sys.exit(main())
