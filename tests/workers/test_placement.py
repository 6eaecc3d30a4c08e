"""Slots of experts: the numbering, what moves between two placements, and what ranks report of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.workers.engine import in_step, load, random_prompts, run_on_layout, whole_prompts
from tests.workers.ranks import RankProcesses
from workers.config import ParallelLayout, ShardSpec
from workers.errors import PlanError
from workers.experts.rebalance import WeightMoves
from workers.experts.slots import ReplicaTable
from workers.kernels.gate import slots_of_chosen
from workers.layout import Span
from workers.parallel import ParallelState
from workers.placement_map import EMPTY_SLOT, initial_placement, moves_between, slots_of, slots_per_rank
from workers.runner import ModelRunner
from workers.step import PlacementUpdate, StepPlan

sizes = st.tuples(st.integers(1, 40), st.integers(0, 50), st.integers(1, 16)).filter(lambda s: s[0] >= s[2])


@given(sizes)
def test_every_expert_has_a_slot_at_first_and_ranks_differ_by_one(size: tuple[int, int, int]) -> None:
    num_experts, redundant, ep = size
    placement, width = initial_placement(*size), slots_per_rank(*size)
    held = [[e for e in placement[rank * width : (rank + 1) * width] if e != EMPTY_SLOT] for rank in range(ep)]
    copies = Counter(expert for experts in held for expert in experts)
    assert len(placement) == ep * width
    assert sum(copies.values()) == num_experts + redundant
    assert copies.keys() == set(range(num_experts))
    assert max(copies.values()) - min(copies.values()) <= 1
    assert max(map(len, held)) - min(map(len, held)) <= 1


@st.composite
def placements(draw: st.DrawFn, num_experts: int, num_slots: int) -> list[int]:
    others = st.lists(
        st.integers(EMPTY_SLOT, num_experts - 1), min_size=num_slots - num_experts, max_size=num_slots - num_experts
    )
    placed: list[int] = draw(st.permutations([*range(num_experts), *draw(others)]))
    return placed


@given(st.data(), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))
def test_the_moves_between_two_placements_give_the_new_one(
    data: st.DataObject, num_experts: int, ep: int, spare: int
) -> None:
    width = -(-num_experts // ep) + spare
    old, new = (data.draw(placements(num_experts, ep * width)) for _ in range(2))
    moved = list(old)
    for move in moves_between(old, new, width):
        assert old[move.source] != old[move.target], "moved what was there already"
        has_near = new[move.target] in old[move.target // width * width :][:width]
        assert has_near == (move.source // width == move.target // width), "fetched from afar what was near"
        moved[move.target] = old[move.source]
    assert all(got == want for got, want in zip(moved, new, strict=True) if want != EMPTY_SLOT)


@given(st.data(), st.integers(1, 8), st.integers(1, 4))
def test_replicas_share_the_tokens_of_their_expert(data: st.DataObject, num_experts: int, spare: int) -> None:
    placement = data.draw(placements(num_experts, num_experts + spare))
    table = ReplicaTable(placement, num_experts, torch.device("cpu"), can_change=True)
    replicas = table.replicas
    assert replicas is not None
    for expert, slots in enumerate(slots_of(placement, num_experts)):
        chosen = slots_of_chosen(torch.full((12 * len(slots), 1), expert), replicas).flatten().tolist()
        assert Counter(chosen) == dict.fromkeys(slots, 12)


def test_ranks_report_the_tokens_of_their_slots_since_the_last_report(moe_fp8: Path, two_ranks: RankProcesses) -> None:
    # given: two groups of 3 prompts each; the last MoE layer computes the ends of prompts alone
    groups = [[whole_prompts(random_prompts([9, 4, 8], 300, seed)), StepPlan(step=0)] for seed in (1, 2)]
    orders = [[replace(plan, report_loads=True) for plan in plans] for plans in in_step(groups)]
    # when
    ranks = two_ranks.run(run_on_layout, moe_fp8, ParallelLayout(dp=2), orders, {"redundant_experts": 1})
    # then: 2 experts a token, in 2 MoE layers over 2 x 3 slots
    first, second = zip(*([result.expert_loads for result in ran.results] for ran in ranks), strict=True)
    assert [sum(sum(loads[layer]) for loads in first) for layer in (0, 1)] == [2 * 42, 2 * 6]
    assert [[len(layer) for layer in loads] for loads in first] == [[3, 3], [3, 3]]
    assert second == ([[0] * 3] * 2, [[0] * 3] * 2)


def move_stacks(parallel: ParallelState, layout: ParallelLayout, old: list[int], new: list[int]) -> list[list[float]]:
    """What each local slot holds after the moves, in three kinds of stacks; an expert's weights are its number."""
    spec = ShardSpec(layout, parallel.rank)
    width = len(old) // layout.ep
    local = Span(spec.ep_rank * width, (spec.ep_rank + 1) * width)
    numbers = torch.tensor(old[local.start : local.stop], dtype=torch.float32)[:, None, None].expand(-1, 3, 4)
    stacks = [numbers.clone(), numbers.mT.contiguous().mT, numbers.to(torch.float8_e4m3fn)]
    moves = WeightMoves(moves_between(old, new, width), local, spec, parallel.world)
    for stack in stacks:
        moves.move(stack)
        assert (stack.float() == stack[:, :1, :1].float()).all()
    return [stack[:, 0, 0].tolist() for stack in stacks]


@pytest.mark.parametrize("layout", [ParallelLayout(dp=4), ParallelLayout(tp=4, expert_tp=2)], ids=str)
def test_weights_of_any_type_and_order_move_to_their_slots(layout: ParallelLayout, four_ranks: RankProcesses) -> None:
    old, new = [0, 1, 2, 3, 4, 5, 0, EMPTY_SLOT], [5, 0, 3, 2, 1, 5, 4, 0]
    width = 8 // layout.ep
    for rank, stacks in enumerate(four_ranks.run(move_stacks, layout, old, new)):
        first = rank // layout.expert_tp * width
        assert stacks == [new[first : first + width]] * 3


def test_loads_are_not_reported_unasked(moe_runner: ModelRunner) -> None:
    assert moe_runner.execute(StepPlan(step=1)).expert_loads == []


BAD_UPDATES = {
    "placement 0 comes after placement 0": PlacementUpdate(version=0, layers=[[0, 1, 2, 3, 4]] * 2),
    "placement 1 has 1 layers, not 2": PlacementUpdate(version=1, layers=[[0, 1, 2, 3, 4]]),
    "MoE layer 1: 4 slots, the ranks have 5": PlacementUpdate(version=1, layers=[[0, 1, 2, 3, 4], [0, 1, 2, 3]]),
    "MoE layer 0: expert 5 is outside": PlacementUpdate(version=1, layers=[[0, 1, 2, 3, 5]] * 2),
    "MoE layer 0: expert 4 has no slot": PlacementUpdate(version=1, layers=[[0, 1, 2, 3, 3]] * 2),
    "has all experts at one place": PlacementUpdate(version=1, layers=[[1, 0, 2, 3, 4]] * 2),
}


@pytest.mark.parametrize("message", BAD_UPDATES)
def test_a_placement_that_cannot_be_is_refused_before_anything_moves(message: str, moe_fp8: Path) -> None:
    runner = load(moe_fp8)
    with pytest.raises(PlanError, match=message):
        runner.place(BAD_UPDATES[message])
    assert runner.experts.version == 0
