"""What is run before a rank is ready: on a GPU chunks of every size that kernels tell apart."""

from __future__ import annotations

from typing import Any

import pytest

from workers.config import RunnerConfig
from workers.step import StepPlan
from workers.warm_up import warm_up, warm_up_sizes


@pytest.mark.parametrize(
    ("longest", "sizes"), [(-1, []), (0, []), (1, [1]), (16, [16]), (100, [16, 32, 64, 100]), (64, [16, 32, 64])]
)
def test_chunks_double_up_to_the_longest(longest: int, sizes: list[int]) -> None:
    assert warm_up_sizes(longest) == sizes


def chunks_run(**config: Any) -> list[int]:
    plans: list[StepPlan] = []
    warm_up(plans.append, RunnerConfig(model_dir="", rank=0, block_size=16, **config), num_blocks=5)
    assert [bool(plan.prefills) + 2 * bool(plan.decodes) + 3 * bool(plan.close) for plan in plans] == [1, 2, 3] * (
        len(plans) // 3
    )
    return [plan.num_tokens for plan in plans if plan.prefills]


def test_a_gpu_runs_all_of_them_and_a_cpu_one() -> None:
    assert chunks_run(device="cuda", max_model_len=1000) == [16, 32, 64, 79]
    assert chunks_run(device="cpu", max_model_len=1000) == [15]
    assert chunks_run(device="cpu", max_model_len=1) == []
