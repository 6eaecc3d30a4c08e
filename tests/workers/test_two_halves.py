"""Steps as two halves: the same tokens and bits as whole, and one half computes while the other's rows travel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import MOE, write_checkpoint
from tests.workers.engine import (
    GREEDY,
    Ran,
    decode_steps,
    in_step,
    open_slot,
    random_prompts,
    run,
    run_on_layout,
    runner_config,
)
from tests.workers.ranks import TIMEOUT_S, RankProcesses
from workers.config import ParallelLayout
from workers.experts.layer import ExpertLayer
from workers.model import DecoderLayer
from workers.parallel import ParallelState
from workers.runner import ModelRunner
from workers.step import Draft, Prefill, SamplingParams, Score, StepPlan
from workers.two_halves import Arriving, TravelAtOnce, halve

LONG, SHORT, OTHER = random_prompts([41, 9, 30], 300, seed=3)
SEEDED = SamplingParams(temperature=0.8, seed=4, num_logprobs=2)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"num_hidden_layers": 4, "num_experts": 6, "moe_intermediate_size": 128, "mlp_only_layers": [1]}
    return write_checkpoint(tmp_path_factory.mktemp("moe"), MOE, fp8=True, **changes)


def busy_group() -> list[StepPlan]:
    """Chunks that are cut, prompts that are scored, decodes beside prompts, guesses, decodes alone."""
    return [
        StepPlan(1, open=[open_slot(0)], prefills=[Prefill(0, 0, LONG[:30], False, Score(LONG[1:31], 1))]),
        StepPlan(
            2,
            open=[open_slot(1, SEEDED)],
            prefills=[Prefill(0, 30, LONG[30:], True, Score(LONG[31:], 1)), Prefill(1, 0, SHORT, True)],
        ),
        StepPlan(3, decodes=[0, 1]),
        StepPlan(4, open=[open_slot(2)], prefills=[Prefill(2, 0, OTHER, True)], decodes=[0, 1], drafts=[Draft(0, [7])]),
        *decode_steps([1, 2], 3),
    ]


def quiet_group() -> list[StepPlan]:
    """Idle at first, then a prompt of its own; idle at the end."""
    return [StepPlan(1), StepPlan(2, open=[open_slot(0)], prefills=[Prefill(0, 0, OTHER[:5], True)]), StepPlan(3)]


def told(ran: list[Ran]) -> list[tuple[Any, ...]]:
    return [
        (result.token_ids, result.accepted_ids, result.logprobs, result.prompt_logprobs)
        for rank in ran
        for result in rank.results
    ]


@pytest.mark.parametrize("layout", [ParallelLayout(dp=2), ParallelLayout(tp=2, dp=2)], ids=str)
def test_halves_give_the_tokens_and_bits_of_whole_steps(
    layout: ParallelLayout, moe: Path, request: pytest.FixtureRequest
) -> None:
    ranks: RankProcesses = request.getfixturevalue("two_ranks" if layout.world_size == 2 else "four_ranks")
    orders = in_step([busy_group(), quiet_group()])

    whole = ranks.run(run_on_layout, moe, layout, orders, {"halved_from": 0})
    halved = ranks.run(run_on_layout, moe, layout, orders, {"halved_from": 1})

    assert told(halved) == told(whole)
    for one, other in zip(halved, whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


class Notes(TravelAtOnce):
    """What happens, in its order: exchanges here, and computing as the layers are patched to tell."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, after: Callable[[], AbstractContextManager[object]], exchange: Callable[[], Any]) -> Arriving[Any]:
        self.events.append("exchange")
        return super().start(after, exchange)


def events_of_a_layer(parallel: ParallelState, directory: Path) -> list[str]:
    """Of the first of four layers, and of attention in the next."""
    layout = ParallelLayout(dp=2)
    config = runner_config(directory, rank=parallel.rank, layout=layout, halved_from=20)
    runner = ModelRunner(config, parallel.regrouped(layout, TIMEOUT_S))
    notes = runner._travel = Notes()
    attend, apply = DecoderLayer.to_experts, ExpertLayer.apply

    def noted_attend(self: DecoderLayer, *arguments: Any) -> Tensor:
        notes.events.append(f"attend {self.layer}")
        return attend(self, *arguments)

    def noted_apply(self: ExpertLayer, *arguments: Any) -> Tensor:
        notes.events.append("experts")
        return apply(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecoderLayer, "to_experts", noted_attend)
        patch.setattr(ExpertLayer, "apply", noted_apply)
        plan = StepPlan(1, open=[open_slot(0, GREEDY)], prefills=[Prefill(0, 0, OTHER, True)])
        run(runner, in_step([[plan], [plan]])[0])
    return notes.events


def test_one_half_computes_while_the_others_rows_travel(moe: Path, two_ranks: RankProcesses) -> None:
    for events in two_ranks.run(events_of_a_layer, moe):
        # Both attend before the host waits for the first counts: the device is not to be idle meanwhile.
        first = ["attend 0", "attend 0", "exchange", "experts", "exchange", "exchange", "experts", "exchange"]
        assert events[: len(first)] == first
        # Layer 1 is dense; the last one computes the sampled row alone.
        assert events[len(first) : 2 * len(first)] == [event.replace("0", "2") for event in first]


def test_a_plan_is_cut_in_the_middle_of_its_rows() -> None:
    plan = busy_group()[3]

    first, second = halve(plan)

    assert (first.num_tokens, second.num_tokens) == (17, 16)
    assert first.prefills == [Prefill(2, 0, OTHER[:17], False)]
    assert second.prefills == [Prefill(2, 17, OTHER[17:], True)]
    assert (second.decodes, second.drafts) == (plan.decodes, plan.drafts)
    assert (first.open, second.open) == ([], []), "slots are opened once, for both"
