"""Checkpoints, loaded runners and rank processes shared by the tests of the data plane."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import DENSE, MOE, reference_model, write_checkpoint
from tests.workers.engine import load
from tests.workers.ranks import RankProcesses
from workers.runner import ModelRunner

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "dense fp8, tied": {"base": DENSE, "fp8": True},
    "dense bf16, untied": {"base": DENSE, "fp8": False, "tie_word_embeddings": False},
    "moe fp8": {"base": MOE, "fp8": True},
    "moe bf16, heads of 64, every second layer, weights not normalised": {
        "base": MOE,
        "fp8": False,
        "head_dim": 64,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [],
    },
}


@dataclass
class Case:
    """A checkpoint, our runner of it, and transformers' model of the same weights."""

    directory: Path
    runner: ModelRunner
    reference: Any

    def reference_logits(self, token_ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.reference(torch.tensor([token_ids])).logits[0]
        return logits


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=CHECKPOINTS, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **CHECKPOINTS[request.param])
    reference = reference_model(directory, tmp_path_factory.mktemp("reference"))
    return Case(directory, load(directory), reference)


@pytest.fixture(scope="session")
def moe_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("moe"), MOE, fp8=True)


@pytest.fixture(scope="session")
def dense_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense"), DENSE, fp8=True)


@pytest.fixture(scope="session")
def moe_runner(moe_fp8: Path) -> ModelRunner:
    return load(moe_fp8)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankProcesses]:
    ranks = RankProcesses(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankProcesses]:
    ranks = RankProcesses(4)
    yield ranks
    ranks.stop()
