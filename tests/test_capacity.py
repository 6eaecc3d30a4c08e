"""Redundant experts that make no sense or do not fit are refused in one line with the numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.capacity import check_redundant_experts, expert_bytes
from cluster.config import ClusterConfig, EngineConfig, ModelSource
from cluster.errors import ConfigError
from tests.checkpoints import DENSE, MOE, write_checkpoint
from workers.config import ModelConfig


def check(directory: Path, **engine: int) -> None:
    config = ClusterConfig(model=ModelSource(path=directory, name="tiny"), engine=EngineConfig(**engine))
    check_redundant_experts(config, ModelConfig.from_dir(directory))


def refusal(directory: Path, **engine: int) -> str:
    with pytest.raises(ConfigError) as refused:
        check(directory, **engine)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe"), MOE, fp8=True)


def test_a_dense_model_has_no_use_for_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DENSE, fp8=True)

    assert "tiny has no experts" in refusal(tmp_path, tp=2, redundant_experts=1)


def test_more_than_one_replica_of_each_expert_on_each_place_is_refused(moe: Path) -> None:
    assert "at most 5" in refusal(moe, tp=2, redundant_experts=6)
    assert "at most 0" in refusal(moe, redundant_experts=1)
    check(moe, tp=2, redundant_experts=5)


def test_more_than_the_memory_holds_is_refused_naming_what_fits(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, model = expert_bytes(ModelConfig.from_dir(moe)), sum(f.stat().st_size for f in moe.glob("*.safetensors"))
    memory = SimpleNamespace(total=model + 2 * one)
    monkeypatch.setattr("cluster.capacity.psutil.virtual_memory", lambda: memory)

    assert "at most 2 fit" in refusal(moe, tp=2, redundant_experts=5)
    check(moe, tp=2, redundant_experts=1)
