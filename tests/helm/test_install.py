"""What `helm install` says where the cluster lacks something: a sentence, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helm.chart import CHART, Helm
from tests.helm.fake_kubernetes import KINDS, RAY, Secrets, fake_kubernetes

PORTS = {"tls.crt": "", "tls.key": "", "ca.crt": ""}
WITH_SECRETS = (
    "security.tls.mode=existing",
    "security.tls.secretName=ports",
    "security.tls.linkSecretName=link",
    "security.keys.secretName=api-keys",
)


def install(helm: Helm, kinds: dict[str, dict[str, str]], secrets: Secrets, folder: Path) -> tuple[int, str]:
    """Return code and words of a dry run against a cluster like that."""
    with fake_kubernetes(kinds, secrets, folder) as kubeconfig:
        args = [
            "install",
            "try",
            str(CHART),
            "--namespace",
            "models",
            "--dry-run=server",
            "--disable-openapi-validation",
        ]
        args += ["--values", str(CHART / "values-pocket.yaml"), "--kubeconfig", str(kubeconfig)]
        done = helm.run(*args, *(f"--set={value}" for value in WITH_SECRETS))
    return done.returncode, done.stdout + done.stderr


def test_a_cluster_that_has_everything_is_content(helm: Helm, tmp_path: Path) -> None:
    secrets = {"ports": PORTS, "link": PORTS, "api-keys": {"keys.yaml": ""}}

    code, words = install(helm, KINDS | RAY, secrets, tmp_path)

    assert code == 0, words


def test_secrets_that_are_not_there_yet_are_left_to_the_kubelet(helm: Helm, tmp_path: Path) -> None:
    code, words = install(helm, KINDS | RAY, {}, tmp_path)

    assert code == 0, words


@pytest.mark.parametrize(
    ("secrets", "sentence"),
    [
        ({"api-keys": {"keys": ""}}, "Secret api-keys has no key keys.yaml; it has keys"),
        ({"ports": {"cert": "", "tls.key": ""}}, "Secret ports has no key tls.crt; it has cert, tls.key"),
        ({"link": {"tls.crt": "", "tls.key": ""}}, "Secret link has no key ca.crt; it has tls.crt, tls.key"),
    ],
)
def test_a_secret_without_the_key_is_a_sentence(helm: Helm, tmp_path: Path, secrets: Secrets, sentence: str) -> None:
    code, words = install(helm, KINDS | RAY, secrets, tmp_path)

    assert code != 0
    assert sentence in words


def test_a_cluster_without_kuberay_is_a_sentence(helm: Helm, tmp_path: Path) -> None:
    code, words = install(helm, KINDS, {}, tmp_path)

    assert code != 0
    assert 'no matches for kind "RayService" in version "ray.io/v1"' in words
    assert "ensure CRDs are installed first" in words
