"""As much of Kubernetes' API as `helm install --dry-run=server` asks: what kinds there are, and some Secrets."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

KINDS: dict[str, dict[str, str]] = {
    "v1": {
        "configmaps": "ConfigMap",
        "persistentvolumeclaims": "PersistentVolumeClaim",
        "pods": "Pod",
        "secrets": "Secret",
        "serviceaccounts": "ServiceAccount",
        "services": "Service",
    },
    "batch/v1": {"jobs": "Job"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "cert-manager.io/v1": {"certificates": "Certificate", "issuers": "Issuer"},
}
RAY: dict[str, dict[str, str]] = {"ray.io/v1": {"rayservices": "RayService"}}

Secrets = Mapping[str, Mapping[str, str]]


@contextmanager
def fake_kubernetes(kinds: dict[str, dict[str, str]], secrets: Secrets, folder: Path) -> Iterator[Path]:
    """Yields the kubeconfig of a cluster with these kinds by API version, and these Secrets."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, answer = _answer(self.path.partition("?")[0], kinds, secrets)
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self._echo()

        def do_PATCH(self) -> None:
            self._echo()

        def _echo(self) -> None:
            """A dry run gives back what it was given."""
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(201)
            self.send_header("Content-Type", self.headers["Content-Type"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield _kubeconfig(folder, server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _kubeconfig(folder: Path, port: int) -> Path:
    file = folder / "kubeconfig"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fake",
        "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "fake", "user": {}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
    }
    file.write_text(json.dumps(config))
    return file


def _answer(path: str, kinds: dict[str, dict[str, str]], secrets: Secrets) -> tuple[int, dict[str, Any]]:
    groups = [version for version in kinds if "/" in version]
    match path.strip("/").split("/"):
        case ["version"]:
            return 200, {"major": "1", "minor": "35", "gitVersion": "v1.35.0"}
        case ["api"]:
            return 200, {"kind": "APIVersions", "versions": ["v1"]}
        case ["apis"]:
            return 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(version) for version in groups]}
        case ["api", "v1"]:
            return 200, _resources("v1", kinds)
        case ["apis", group, version] if f"{group}/{version}" in kinds:
            return 200, _resources(f"{group}/{version}", kinds)
        case ["api", "v1", "namespaces", _, "secrets"]:
            return 200, {"kind": "SecretList", "apiVersion": "v1", "metadata": {}, "items": []}
        case ["api", "v1", "namespaces", namespace, "secrets", name] if name in secrets:
            data = {key: base64.b64encode(value.encode()).decode() for key, value in secrets[name].items()}
            metadata = {"name": name, "namespace": namespace}
            return 200, {"kind": "Secret", "apiVersion": "v1", "metadata": metadata, "data": data}
    return 404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}


def _group(version: str) -> dict[str, Any]:
    named = {"groupVersion": version, "version": version.partition("/")[2]}
    return {"name": version.partition("/")[0], "versions": [named], "preferredVersion": named}


def _resources(version: str, kinds: dict[str, dict[str, str]]) -> dict[str, Any]:
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    found = [
        {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
        for name, kind in kinds[version].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": found}
