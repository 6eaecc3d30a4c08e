"""Redundant experts and contexts that make no sense or do not fit are refused in one line with the numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.capacity import check_context, check_redundant_experts, expert_bytes
from cluster.config import ClusterConfig, EngineConfig, ModelSource
from cluster.errors import ConfigError
from cluster.ray_cluster import check_devices
from tests.checkpoints import DENSE, MOE, write_checkpoint
from workers.config import ModelConfig


def check(directory: Path, **engine: int) -> None:
    config = ClusterConfig(model=ModelSource(path=directory, name="tiny"), engine=EngineConfig.model_validate(engine))
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


def context(directory: Path, **engine: Any) -> None:
    config = ClusterConfig(
        model=ModelSource(path=directory, name="tiny"), engine=EngineConfig.model_validate(engine | {"block_size": 16})
    )
    check_context(config, ModelConfig.from_dir(directory), config.engine.device if "device" in engine else None)


def test_a_context_longer_than_the_models_is_refused(moe: Path) -> None:
    with pytest.raises(ConfigError, match=r"--max-model-len 513 is over the 512 tokens that tiny was made for; lower"):
        context(moe, max_model_len=513)


def test_a_context_that_kv_memory_does_not_hold_is_refused_naming_what_would_do(moe: Path) -> None:
    # 3 layers, K and V of 2 heads of 128 in fp32, half of it on each of two ranks
    needed_bytes = 512 * 3 * 2 * 2 * 128 * 4

    with pytest.raises(ConfigError, match=f"512 needs {needed_bytes} bytes .* they hold 496 tokens; raise"):
        context(moe, max_model_len=512, device="cpu", kv_memory_bytes=needed_bytes - 1)
    with pytest.raises(ConfigError, match=f"512 needs {needed_bytes // 4} bytes"):
        context(moe, max_model_len=512, tp=2, kv_memory_bytes=needed_bytes // 4 - 1)
    context(moe, max_model_len=512, device="cpu", kv_memory_bytes=needed_bytes)
    context(moe, max_model_len=512, device="cpu", kv_memory_bytes=needed_bytes // 2, kv_dtype="bf16")
    context(moe, max_model_len=512, device="cpu")


def test_where_auto_is_a_cpu_a_context_has_to_fit_a_cpus_kv_memory(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed_bytes = 512 * 3 * 2 * 2 * 128 * 4
    monkeypatch.setattr("cluster.capacity.CPU_KV_BYTES", needed_bytes - 1)
    engine = EngineConfig(max_model_len=512, block_size=16)
    config = ClusterConfig(model=ModelSource(path=moe, name="tiny"), engine=engine)

    with pytest.raises(ConfigError, match="they hold 496 tokens"):
        check_devices(config, 0)
    check_devices(config, 1)


def test_a_context_that_nobody_asked_for_is_what_there_is_room_for(moe: Path) -> None:
    context(moe, device="cpu", kv_memory_bytes=1)
