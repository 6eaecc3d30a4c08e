"""What `mull plan` recommends is what the chart installs, and what `mull serve` takes."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

from cluster.config_file import parse_config
from cluster.flags import add_serve_flags, config_from_flags
from cluster.planner.devices import find_device
from cluster.planner.layouts import Candidate, Limits
from cluster.planner.models import find_model
from cluster.planner.recommendation import helm_values, serve_flags
from tests.helm.chart import CHART, Helm
from workers.layout import ParallelLayout

LIMITS = Limits(max_num_seqs=128, max_num_batched_tokens=4096, context=65536)
CANDIDATES = {
    "one GPU": ("qwen3-4b", Candidate(layout=ParallelLayout(), copies=1), 1, 1),
    "a node": ("qwen3-235b", Candidate(layout=ParallelLayout(tp=4, dp=2), copies=1), 1, 8),
    "split experts": ("qwen3-235b", Candidate(layout=ParallelLayout(tp=4, dp=1, expert_tp=2), copies=1), 1, 4),
    "copies that share nodes": ("qwen3-235b", Candidate(layout=ParallelLayout(tp=4), copies=2), 2, 4),
    "a copy over two nodes": ("qwen3-235b", Candidate(layout=ParallelLayout(tp=8, dp=2), copies=1), 2, 8),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_chart_installs_the_recommendation(helm: Helm, tmp_path: Path, name: str) -> None:
    model_name, candidate, pods, gpus = CANDIDATES[name]
    file = tmp_path / "planned.yaml"
    file.write_text(helm_values(find_model(model_name), candidate, LIMITS, find_device("h200"), redundant=0))

    base = str(CHART / "values-235b-8xh200.yaml")
    rendered = helm.template(preset=None, more=["--values", base, "--values", str(file)])

    ranks = rendered.group("ranks")
    engine = parse_config(rendered.cluster_config).engine
    assert (ranks["replicas"], ranks["resources"]["GPU"]) == (pods, str(gpus))
    assert (engine.layout, engine.redundant_experts) == (candidate.layout, 0)
    assert rendered.replicas["Router"] == candidate.copies
    assert (engine.max_model_len, engine.max_num_seqs, engine.max_num_batched_tokens) == (65536, 128, 4096)


@pytest.mark.parametrize("name", CANDIDATES)
def test_mull_serve_takes_the_recommended_flags(name: str) -> None:
    model_name, candidate, *_ = CANDIDATES[name]
    flags = serve_flags(find_model(model_name), candidate, LIMITS, find_device("h200"), redundant=8)
    parser = argparse.ArgumentParser()
    add_serve_flags(parser, fallbacks={})

    config = config_from_flags(parser.parse_args(shlex.split(flags)[2:]))

    assert config.engine.layout == candidate.layout
    assert (config.engine.device, config.engine.redundant_experts, config.router.copies) == (
        "cuda",
        8,
        candidate.copies,
    )
    assert (config.engine.max_model_len, config.engine.max_num_seqs) == (65536, 128)
