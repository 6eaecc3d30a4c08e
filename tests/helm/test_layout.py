"""GPU counts, pods and memory follow from `layout`, and a contradiction is a sentence."""

import pytest

from cluster.capacity import check_redundant_experts
from cluster.config_file import parse_config
from tests.helm.chart import POCKET, PRESETS, Helm, Rendered
from tests.workers.test_layout import MODELS


def ranks(rendered: Rendered) -> tuple[int, dict[str, str]]:
    """Pods with ranks, and what Ray has of each."""
    group = rendered.group("ranks")
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    return group["replicas"], group["resources"]


def limits(rendered: Rendered) -> dict[str, str]:
    (container,) = rendered.group("ranks")["template"]["spec"]["containers"]
    found: dict[str, str] = container["resources"]["limits"]
    return found


@pytest.mark.parametrize(
    ("preset", "pods", "gpus"),
    [
        ("values-4b-1xh200.yaml", 1, 1),
        ("values-235b-4xh100.yaml", 1, 4),
        ("values-235b-8xh200.yaml", 1, 8),
        ("values-235b-2-nodes.yaml", 2, 8),
    ],
)
def test_a_preset_asks_for_its_gpus_once(helm: Helm, preset: str, pods: int, gpus: int) -> None:
    rendered = helm.template(preset=preset)

    engine = rendered.cluster_config["engine"]
    assert ranks(rendered) == (pods, {"CPU": str(gpus + 1), "GPU": str(gpus)})
    assert limits(rendered)["nvidia.com/gpu"] == str(gpus)
    assert engine["tp"] * engine["dp"] == pods * gpus
    assert engine["device"] == "cuda"


def test_a_copy_that_is_smaller_than_a_node_gets_a_pod_of_its_size(helm: Helm) -> None:
    values = ("layout.tp=2", "layout.dp=1", "layout.copies=3", "layout.gpus=6")

    rendered = helm.template(*values, preset="values-235b-8xh200.yaml")

    assert ranks(rendered) == (3, {"CPU": "3", "GPU": "2"})
    assert rendered.replicas["Router"] == 3


def test_more_copies_or_gateways_leave_those_that_run_as_they_are(helm: Helm) -> None:
    """Serve replaces whatever is built from other arguments."""
    few, many = helm.template(), helm.template("layout.copies=3", "gateway.replicas=2")

    assert many.replicas == {"Gateway": 2, "Router": 3}
    assert many.cluster_config == few.cluster_config
    assert many.one("ConfigMap", "try-mull") == few.one("ConfigMap", "try-mull")


def test_memory_is_the_ranks_share_and_shared_memory(helm: Helm) -> None:
    rendered = helm.template("layout.tp=3", "layout.memoryGiBPerRank=5", "layout.shmGiB=4")

    assert limits(rendered)["memory"] == "21Gi"  # 3 * 5, 4 and 2 for the Router and Ray
    volumes = {it["name"]: it for it in rendered.group("ranks")["template"]["spec"]["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (["layout.gpus=6"], "layout.gpus is 6, but copies 1 * tp 4 * dp 2 needs 8; change one of them"),
        (["layout.copies=2"], "layout.gpus is 8, but copies 2 * tp 4 * dp 2 needs 16"),
        (["layout.expertTp=3"], "layout.expertTp 3 does not divide tp 4 * dp 2 = 8 ranks"),
        (["layout.ranksPerNode=3"], "tp 4 * dp 2 = 8 ranks, which do not fill nodes of 3"),
        (["layout.ranksPerNode=2"], "the 4 ranks of an attention group (tp) share a node, and 2 ranks of a pod"),
        (["layout.device=cpu"], "layout.gpus is 8 and layout.device is cpu"),
        (["layout.tp=0"], "/layout/tp"),
        (["layout.gpu=8"], "additional properties 'gpu' not allowed"),
    ],
)
def test_a_contradiction_is_a_sentence(helm: Helm, values: list[str], sentence: str) -> None:
    assert sentence in helm.refusal(*values, preset="values-235b-8xh200.yaml")


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != POCKET])
def test_a_presets_layout_splits_the_model_that_it_names(helm: Helm, preset: str) -> None:
    rendered = helm.template(preset=preset)

    config = parse_config(rendered.cluster_config)
    model = MODELS["4B" if "4B" in config.model.name else "235B"]
    config.engine.layout.check(model)
    check_redundant_experts(config, model)
    assert (config.engine.max_model_len or 0) <= model.max_position_embeddings
