"""One model gives the same tokens however it is spread over ranks, and wherever its experts lie."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import DENSE, MOE, write_checkpoint
from tests.workers.engine import (
    Order,
    Ran,
    decode_steps,
    in_step,
    load,
    open_slot,
    random_prompts,
    run,
    run_on_layout,
    whole_prompts,
)
from tests.workers.ranks import RankProcesses
from tests.workers.tape import on_tape, on_tape_in_groups
from workers.config import ModelConfig, ParallelLayout
from workers.placement_map import slots_per_rank
from workers.step import PlacementUpdate, Prefill, SamplingParams, StepPlan

POCKET = Path(__file__).parents[2] / "deploy" / "models" / "pocket"
NUM_TOKENS = 8
LATE = 3
"""Steps by which each group starts after the one before it: till then, and at its end, it is without work."""
PROMPTS = random_prompts([1, 30, 7, 16, 2, 21, 9], 300, seed=11)
SAMPLING = [SamplingParams(temperature=0.0)] * 4 + [SamplingParams(temperature=0.8, seed=slot) for slot in range(3)]


@dataclass(frozen=True)
class Spread:
    """A layout and what else changes with it."""

    layout: ParallelLayout
    redundant: int = 0
    rebalance_before: tuple[int, ...] = ()
    """Steps before which all experts get other places."""

    def __str__(self) -> str:
        redundant = f" redundant={self.redundant}" if self.redundant else ""
        return f"{self.layout}{redundant}" + (" rebalanced" if self.rebalance_before else "")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    scratch = tmp_path_factory.mktemp("layouts")
    dense = write_checkpoint(scratch / "dense", DENSE, fp8=True, intermediate_size=640)
    wide = {"intermediate_size": 640, "moe_intermediate_size": 256, "num_experts": 6, "num_experts_per_tok": 3}
    return {"pocket": POCKET, "dense": dense, "moe": write_checkpoint(scratch / "moe", MOE, fp8=True, **wide)}


def group_plans(group: int, num_groups: int) -> list[StepPlan]:
    """Prefill and decodes of every num_groups-th prompt."""
    prompts, sampling = PROMPTS[group::num_groups], SAMPLING[group::num_groups]
    idle = [StepPlan(step=0)] * (LATE * group)
    return [*idle, whole_prompts(prompts, sampling), *decode_steps(list(range(len(prompts))), NUM_TOKENS - 1)]


def shuffled_placement(config: ModelConfig, spread: Spread, version: int) -> PlacementUpdate:
    """Each layer: all experts once, and any of them in the other slots, in random order."""
    draw, ep = random.Random(version), spread.layout.ep
    num_slots = ep * slots_per_rank(config.num_experts, spread.redundant, ep)
    layers = []
    for layer in range(config.num_layers):
        if config.is_moe_layer(layer):
            others = [draw.randrange(config.num_experts) for _ in range(num_slots - config.num_experts)]
            placement = [*range(config.num_experts), *others]
            draw.shuffle(placement)
            layers.append(placement)
    return PlacementUpdate(version=version, layers=layers)


def orders_of(spread: Spread, config: ModelConfig) -> list[list[Order]]:
    plans = in_step([group_plans(group, spread.layout.dp) for group in range(spread.layout.dp)])
    orders: list[list[Order]] = [[*of_group] for of_group in plans]
    for version, step in enumerate(sorted(spread.rebalance_before, reverse=True), 1):
        update = shuffled_placement(config, spread, 10 - version)
        for of_group in orders:
            of_group.insert(step, update)
    return orders


def by_prompt(tokens: list[list[int]], group: int, num_groups: int) -> dict[int, list[int]]:
    sampled = [step for step in tokens if step]
    return {group + slot * num_groups: [step[slot] for step in sampled] for slot in range(len(sampled[0]))}


def alone(directory: Path) -> dict[int, list[int]]:
    return by_prompt(run(load(directory), group_plans(0, 1)).tokens, 0, 1)


def answers(ranks: RankProcesses, directory: Path, spread: Spread, **changes: Any) -> dict[int, list[int]]:
    layout, orders = spread.layout, orders_of(spread, ModelConfig.from_dir(directory))
    changes |= {"redundant_experts": spread.redundant}
    rans: Sequence[Ran] = ranks.run(run_on_layout, directory, layout, orders, changes)
    tokens: dict[int, list[int]] = {}
    for rank, ran in enumerate(rans):
        if rank % layout.tp == 0:
            tokens |= by_prompt(ran.tokens, rank // layout.tp, layout.dp)
        else:
            assert not any(ran.tokens)
    return tokens


ON_TWO = [Spread(ParallelLayout(tp=2)), Spread(ParallelLayout(dp=2))]
ON_FOUR = [Spread(ParallelLayout(tp=4)), Spread(ParallelLayout(tp=2, dp=2)), Spread(ParallelLayout(dp=4))]
OF_EXPERTS_ON_TWO = [
    Spread(ParallelLayout(tp=2), redundant=2),
    Spread(ParallelLayout(dp=2), redundant=3),
    Spread(ParallelLayout(dp=2), rebalance_before=(4,)),
    Spread(ParallelLayout(tp=2), redundant=2, rebalance_before=(2, 5)),
]
OF_EXPERTS_ON_FOUR = [
    Spread(ParallelLayout(tp=2, dp=2), redundant=2),
    Spread(ParallelLayout(tp=2, dp=2), redundant=3, rebalance_before=(1, 6)),
    Spread(ParallelLayout(dp=4), redundant=4, rebalance_before=(5,)),
]
SPLIT_ON_TWO = [Spread(ParallelLayout(tp=2, expert_tp=2)), Spread(ParallelLayout(dp=2, expert_tp=2))]
SPLIT_ON_FOUR = [
    Spread(ParallelLayout(tp=2, dp=2, expert_tp=2)),
    Spread(ParallelLayout(tp=4, expert_tp=2), redundant=2, rebalance_before=(3,)),
]


def check(names: list[str], spread: Spread, ranks: RankProcesses, checkpoints: dict[str, Path]) -> None:
    for name in names:
        assert answers(ranks, checkpoints[name], spread) == alone(checkpoints[name]), name


@pytest.mark.parametrize("spread", ON_TWO, ids=str)
def test_two_ranks_answer_as_one(spread: Spread, two_ranks: RankProcesses, checkpoints: dict[str, Path]) -> None:
    check(["pocket", "dense", "moe"], spread, two_ranks, checkpoints)


@pytest.mark.parametrize("spread", ON_FOUR, ids=str)
def test_four_ranks_answer_as_one(spread: Spread, four_ranks: RankProcesses, checkpoints: dict[str, Path]) -> None:
    check(["pocket", "dense", "moe"], spread, four_ranks, checkpoints)


@pytest.mark.parametrize("spread", OF_EXPERTS_ON_TWO, ids=str)
def test_redundant_and_moved_experts_change_no_token_on_two_ranks(
    spread: Spread, two_ranks: RankProcesses, checkpoints: dict[str, Path]
) -> None:
    check(["pocket", "moe"], spread, two_ranks, checkpoints)


@pytest.mark.parametrize("spread", OF_EXPERTS_ON_FOUR, ids=str)
def test_redundant_and_moved_experts_change_no_token_on_four_ranks(
    spread: Spread, four_ranks: RankProcesses, checkpoints: dict[str, Path]
) -> None:
    check(["pocket", "moe"], spread, four_ranks, checkpoints)


@pytest.mark.parametrize("spread", SPLIT_ON_TWO, ids=str)
def test_experts_in_halves_change_no_token_on_two_ranks(
    spread: Spread, two_ranks: RankProcesses, checkpoints: dict[str, Path]
) -> None:
    check(["moe"], spread, two_ranks, checkpoints)


@pytest.mark.parametrize("spread", SPLIT_ON_FOUR, ids=str)
def test_experts_in_halves_change_no_token_on_four_ranks(
    spread: Spread, four_ranks: RankProcesses, checkpoints: dict[str, Path]
) -> None:
    check(["moe"], spread, four_ranks, checkpoints)


PADDED_ON_TWO = [ON_TWO[0], OF_EXPERTS_ON_TWO[1], OF_EXPERTS_ON_TWO[3]]


@pytest.mark.parametrize("spread", PADDED_ON_TWO, ids=str)
def test_padded_decode_steps_change_no_token_on_two_ranks(
    spread: Spread, two_ranks: RankProcesses, checkpoints: dict[str, Path]
) -> None:
    directory = checkpoints["pocket"]
    assert answers(two_ranks, directory, spread, graphs="piecewise") == alone(directory)


def test_groups_in_steps_of_different_kinds_meet_at_one_size(
    four_ranks: RankProcesses, checkpoints: dict[str, Path]
) -> None:
    directory, spread = checkpoints["pocket"], Spread(ParallelLayout(tp=2, dp=2))
    assert answers(four_ranks, directory, spread, graphs="piecewise") == alone(directory)


def test_collectives_are_called_between_the_pieces_of_a_recording(
    two_ranks: RankProcesses, checkpoints: dict[str, Path]
) -> None:
    plans = group_plans(0, 1)
    (got, num_replays), _ = two_ranks.run(on_tape, checkpoints["dense"], plans, "piecewise")
    assert got == run(load(checkpoints["dense"]), plans).tokens
    assert num_replays == NUM_TOKENS - 1


MOVED_ON_TAPE = [
    Spread(ParallelLayout(tp=2), redundant=2, rebalance_before=(2, 5)),
    Spread(ParallelLayout(dp=2), rebalance_before=(5,)),
]


@pytest.mark.parametrize("spread", MOVED_ON_TAPE, ids=str)
def test_a_recorded_step_follows_the_experts_that_move(
    spread: Spread, two_ranks: RankProcesses, checkpoints: dict[str, Path]
) -> None:
    directory, layout = checkpoints["moe"], spread.layout
    orders = orders_of(spread, ModelConfig.from_dir(directory))
    ranks = two_ranks.run(on_tape_in_groups, directory, layout, orders, spread.redundant)
    told = [by_prompt(ranks[group * layout.tp][0], group, layout.dp) for group in range(layout.dp)]
    assert {prompt: tokens for of_group in told for prompt, tokens in of_group.items()} == alone(directory)
    assert all(num_replays >= NUM_TOKENS - 1 for _, num_replays in ranks)


LONG = random_prompts([110, 100, 90, 5], 300, seed=12)
"""More tokens in a step than are gathered: they are sent to the ranks that need them."""


def chunked(prompt: list[int], cut: int) -> list[StepPlan]:
    """The first chunk samples nothing."""
    opened = open_slot(0)
    first = StepPlan(step=1, open=[opened], prefills=[Prefill(0, 0, prompt[:cut], False)])
    second = StepPlan(step=2, prefills=[Prefill(0, cut, prompt[cut:], True)])
    return [first, second, *decode_steps([0], NUM_TOKENS - 1)]


@pytest.mark.parametrize("layout", [ParallelLayout(dp=4), ParallelLayout(tp=2, dp=2)], ids=str)
def test_long_prompts_in_chunks_beside_decodes_of_other_groups_answer_as_alone(
    layout: ParallelLayout, four_ranks: RankProcesses, checkpoints: dict[str, Path]
) -> None:
    # given: a long prompt in chunks in each group but the last, which decodes meanwhile
    prompts = LONG[: layout.dp - 1] + LONG[-1:]
    chunks = [chunked(prompt, cut=len(prompt) - 7) for prompt in prompts[:-1]]
    orders: list[list[StepPlan]] = in_step([*chunks, [whole_prompts(prompts[-1:]), *decode_steps([0], 7)]])
    for name in ("pocket", "moe"):
        # when
        rans: Sequence[Ran] = four_ranks.run(run_on_layout, checkpoints[name], layout, orders, {})
        # then
        for group, prompt in enumerate(prompts):
            got = [step for step in rans[group * layout.tp].tokens if step]
            want = run(load(checkpoints[name]), [whole_prompts([prompt]), *decode_steps([0], len(got) - 1)]).tokens
            assert got == want, f"{name}, group {group}"
