"""Experts placed by load: every expert somewhere, ranks about level, few moves, nodes kept. Pure."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.router.placement import ExpertGrid, imbalance, num_moves, place_layer, rank_loads, replica_counts
from workers.placement_map import EMPTY_SLOT, initial_placement, placement_problem, slots_per_rank


def make_grid(num_experts: int, redundant: int, num_ranks: int, num_nodes: int = 1) -> ExpertGrid:
    return ExpertGrid(
        num_experts=num_experts,
        slots_per_rank=slots_per_rank(num_experts, redundant, num_ranks),
        nodes=tuple(rank * num_nodes // num_ranks for rank in range(num_ranks)),
    )


def zipf(num_experts: int, exponent: float, seed: int) -> list[float]:
    """Tokens of experts whose popularity follows Zipf's law, in random order."""
    loads = [1e6 / (place + 1) ** exponent for place in range(num_experts)]
    random.Random(seed).shuffle(loads)
    return loads


@st.composite
def layers(draw: st.DrawFn) -> tuple[ExpertGrid, list[int], list[float]]:
    num_ranks = draw(st.integers(1, 8))
    num_experts = num_ranks * draw(st.integers(1, 6)) + draw(st.integers(0, 3))
    redundant = draw(st.integers(0, 12))
    grid = make_grid(num_experts, redundant, num_ranks, draw(st.integers(1, num_ranks)))
    loads = draw(st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts))
    return grid, initial_placement(num_experts, redundant, num_ranks), [float(load) for load in loads]


@settings(deadline=None)
@given(layers())
def test_every_expert_has_a_slot_and_no_rank_has_one_twice(case: tuple[ExpertGrid, list[int], list[float]]) -> None:
    grid, current, loads = case

    slots = place_layer(grid, current, loads)

    assert placement_problem(slots, grid.num_experts, grid.num_slots) is None
    if slots != current:
        for first in range(0, grid.num_slots, grid.slots_per_rank):
            held = [expert for expert in slots[first : first + grid.slots_per_rank] if expert != EMPTY_SLOT]
            assert len(set(held)) == len(held)


@settings(deadline=None)
@given(layers())
def test_a_placement_is_never_worse_than_the_present_one_and_stays_when_made_again(
    case: tuple[ExpertGrid, list[int], list[float]],
) -> None:
    grid, current, loads = case

    slots = place_layer(grid, current, loads)

    before, after = (imbalance(rank_loads(grid, placed, loads)) for placed in (current, slots))
    assert after <= 1.05 * before + 1e-9
    assert imbalance(rank_loads(grid, place_layer(grid, slots, loads), loads)) <= 1.05 * after + 1e-9


@pytest.mark.parametrize(
    ("num_experts", "redundant", "num_ranks", "num_nodes", "exponent"),
    [(128, 16, 8, 1, 1.0), (128, 32, 8, 2, 1.2), (128, 32, 16, 2, 1.0), (128, 32, 32, 4, 1.0)],
)
def test_under_zipf_routing_the_most_loaded_rank_has_at_most_half_of_its_excess(
    num_experts: int, redundant: int, num_ranks: int, num_nodes: int, exponent: float
) -> None:
    grid = make_grid(num_experts, redundant, num_ranks, num_nodes)
    # Against one expert in one place: the present placement would count its first replicas as progress.
    current = initial_placement(num_experts, 0, num_ranks)
    plain = make_grid(num_experts, 0, num_ranks, num_nodes)
    ratios = []
    for layer in range(20):
        loads = zipf(num_experts, exponent, seed=layer)
        before = imbalance(rank_loads(plain, current, loads))
        slots = place_layer(grid, initial_placement(num_experts, redundant, num_ranks), loads)
        after = imbalance(rank_loads(grid, slots, loads))
        assert after < 1.1
        ratios.append(before / after)

    assert sum(ratios) / len(ratios) >= 2


def test_what_is_level_already_stays() -> None:
    grid = make_grid(16, 0, 4)
    current = initial_placement(16, 0, 4)

    assert place_layer(grid, current, [100.0 + expert % 2 for expert in range(16)]) == current


def test_loads_that_change_a_little_move_little() -> None:
    grid = make_grid(128, 16, 8)
    loads = zipf(128, 1.0, seed=1)
    placed = place_layer(grid, initial_placement(128, 16, 8), loads)
    shuffled = random.Random(2)

    again = place_layer(grid, placed, [load * shuffled.uniform(0.9, 1.1) for load in loads])

    assert num_moves(grid, placed, again) <= 0.1 * grid.num_slots


def test_the_hottest_experts_get_the_replicas() -> None:
    counts = replica_counts(make_grid(8, 4, 4), [100, 1, 1, 60, 1, 1, 1, 1])

    assert counts == [4, 1, 1, 2, 1, 1, 1, 1]


def test_an_expert_has_no_more_replicas_than_there_are_ranks() -> None:
    counts = replica_counts(make_grid(4, 12, 2), [1000, 1, 1, 1])

    assert counts == [2, 2, 2, 2]


def test_experts_stay_on_their_node_where_that_levels_the_ranks_as_well() -> None:
    # given: each node has enough work for its ranks, one rank of each has too much
    grid = make_grid(16, 0, 4, num_nodes=2)
    current = initial_placement(16, 0, 4)
    loads = [9.0, 9, 9, 9, 1, 1, 1, 1, 9, 9, 9, 9, 1, 1, 1, 1]
    # when
    slots = place_layer(grid, current, loads)
    # then
    assert imbalance(rank_loads(grid, slots, loads)) == 1
    assert set(slots[:8]) == set(range(8))


def test_ranks_without_any_load_are_level() -> None:
    grid = make_grid(4, 0, 2)

    assert imbalance(rank_loads(grid, initial_placement(4, 0, 2), [0.0] * 4)) == 1
