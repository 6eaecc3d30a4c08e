"""The layout as a table: what each rank does."""

from __future__ import annotations

from pathlib import Path

from cluster.router.layout_table import rank_roles, table_lines
from tests.checkpoints import DENSE, MOE, write_checkpoint
from workers.config import ModelConfig
from workers.layout import ParallelLayout
from workers.step import RankReady


def test_every_rank_has_a_line_with_its_part(tmp_path: Path) -> None:
    model = ModelConfig.from_dir(write_checkpoint(tmp_path, MOE, fp8=True))
    roles = rank_roles(model, ParallelLayout(tp=2, dp=2), redundant_experts=3)
    ranks = [RankReady(rank, 9, f"host{rank // 2}", "cpu", 10, 32, 2**20, 2**21, 1.5) for rank in range(4)]

    lines = [line.split() for line in table_lines(roles, ranks)]

    assert lines[0][:6] == ["rank", "group", "host", "device", "heads", "experts"]
    assert lines[1] == ["0", "0", "host0", "cpu", "2/1", "2", "1.0", "2.0", "320"]
    assert [line[1] for line in lines[1:]] == ["0", "0", "1", "1"]
    assert sum(role.num_experts for role in roles) == 5 + 3


def test_ranks_that_share_experts_hold_the_same_number(tmp_path: Path) -> None:
    model = ModelConfig.from_dir(write_checkpoint(tmp_path, MOE, fp8=True, num_experts=6))

    roles = rank_roles(model, ParallelLayout(tp=2, dp=2, expert_tp=2), redundant_experts=0)

    assert [role.num_experts for role in roles] == [3, 3, 3, 3]


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    model = ModelConfig.from_dir(write_checkpoint(tmp_path, DENSE, fp8=True))

    assert {role.num_experts for role in rank_roles(model, ParallelLayout(tp=2), 0)} == {0}
