"""Random checkpoints of real dimensions load as published ones do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.make_checkpoint import COMMON, SHAPES, NewTensor, RandomWeights, write_checkpoint
from tests.workers.test_layout import MODELS
from workers.checkpoint import Checkpoint
from workers.config import ModelConfig, ParallelLayout, ShardSpec
from workers.kernels.cpu.panels import dense
from workers.weights import whole_model


@pytest.mark.parametrize(("shape", "name"), [("4b", "4B"), ("235b", "235B")])
def test_the_shapes_are_those_of_the_published_models(shape: str, name: str, tmp_path: Path) -> None:
    values = COMMON | SHAPES[shape] | {"eos_token_id": 151645}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert ModelConfig.from_dir(tmp_path) == MODELS[name]


def test_a_generated_checkpoint_loads_on_every_rank(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, "0.1b", layers=1, vocab=256)
    for rank in range(2):
        params = Checkpoint.open(directory).read(ShardSpec(ParallelLayout(tp=2), rank))
        assert all(torch.isfinite(dense(param)).all() for param in params.values())
        spread = dense(params["layers.0.qkv"]).std() * 512**0.5
        assert 0.9 < spread < 1.1


def test_an_expert_of_the_235b_is_drawn_in_its_own_shape() -> None:
    part = next(part for part in whole_model(MODELS["235B"]) if part.name.endswith("experts.127.down_proj.weight"))
    weights = RandomWeights(seed=0)
    assert weights.draw(NewTensor(part.name, part)).shape == (4096, 1536)
    assert weights.draw(NewTensor(part.name, part, is_scale=True)).shape == (32, 12)
