"""When experts are placed anew: what is asked for, what is counted, what is sent. Pure."""

from __future__ import annotations

import pytest

from cluster.errors import EngineError
from cluster.router.balancer import (
    ExpertBalancer,
    LoadReport,
    ModelExperts,
    Placement,
    RebalancePolicy,
    copy_imbalance,
    layer_parts,
    make_balancer,
)
from workers.layout import ParallelLayout
from workers.placement_map import initial_placement
from workers.step import StepPlan, StepResult

POLICY = RebalancePolicy(interval_steps=10, min_tokens_per_expert=1)
LAYOUT = ParallelLayout(tp=2, dp=2)
HOT = [[90, 0], [2, 4], [2, 2], [0, 0]]
"""Tokens of the two slots of each of four ranks."""
LEVEL = [[5, 5]] * 4


def balancer(policy: RebalancePolicy = POLICY, num_layers: int = 1, redundant: int = 2) -> ExpertBalancer:
    experts = ModelExperts(num_experts=6, num_layers=num_layers, num_redundant=redundant)
    return ExpertBalancer(experts, LAYOUT, ["a", "a", "b", "b"], policy)


def asks(subject: ExpertBalancer, step: int) -> bool:
    plans = subject.stamp([StepPlan(step), StepPlan(step)])
    assert len({plan.report_loads for plan in plans}) == 1
    return plans[0].report_loads


def results(step: int, loads: list[list[int]], num_layers: int = 1) -> list[StepResult]:
    return [StepResult(step, rank, expert_loads=[slots] * num_layers) for rank, slots in enumerate(loads)]


def report(subject: ExpertBalancer, step: int, loads: list[list[int]]) -> LoadReport | None:
    assert asks(subject, step)
    return subject.take(results(step, loads))


def placed(subject: ExpertBalancer, step: int) -> Placement:
    """Go through one rebalance."""
    found = report(subject, step, HOT)
    assert found is not None
    update = subject.decide(subject.plan(found))
    assert update is not None
    return update.layers


def test_loads_are_asked_for_every_so_many_steps_and_never_twice_at_once() -> None:
    subject = balancer()

    asked = [step for step in range(15) if asks(subject, step)]
    subject.take(results(10, LEVEL))

    assert asked == [10]
    assert [step for step in range(15, 25) if asks(subject, step)] == [20]


def test_level_loads_move_nothing() -> None:
    subject = balancer()

    assert report(subject, 10, LEVEL) is None
    assert subject.imbalance < 1.2


def test_the_imbalance_is_known_for_a_few_parts_of_the_layers() -> None:
    subject = balancer(num_layers=6)
    assert subject.imbalances == {}
    asks(subject, 10)

    by_rank = [[HOT[rank], *[LEVEL[rank]] * 5] for rank in range(4)]
    subject.take([StepResult(10, rank, expert_loads=loads) for rank, loads in enumerate(by_rank)])

    assert list(subject.imbalances) == ["0-1", "2-2", "3-3", "4-5"]
    assert subject.imbalances["0-1"] > subject.imbalance > subject.imbalances["4-5"] == 1


@pytest.mark.parametrize(
    ("num_layers", "parts"),
    [(1, [(0, 0)]), (3, [(0, 0), (1, 1), (2, 2)]), (94, [(0, 23), (24, 46), (47, 69), (70, 93)])],
)
def test_every_layer_is_in_one_part(num_layers: int, parts: list[tuple[int, int]]) -> None:
    assert [(part[0], part[-1]) for part in layer_parts(num_layers)] == parts
    assert [layer for part in layer_parts(num_layers) for layer in part] == list(range(num_layers))


def test_a_hot_expert_gets_replicas_and_the_update_names_all_slots() -> None:
    subject = balancer()

    layers = placed(subject, 10)

    assert subject.num_rebalances_total == 1
    assert len(layers) == 1
    assert len(layers[0]) == 8
    assert layers[0].count(0) == 3
    assert copy_imbalance(subject.grid, layers, [[90.0, 2, 6, 2, 2, 0]]) < 1.3 < subject.imbalance


def test_what_was_counted_around_a_move_is_not_believed() -> None:
    # given: experts have just been placed anew
    subject = balancer()
    placed(subject, 10)
    before = subject.imbalance
    # when
    mixed = report(subject, 11, HOT)
    # then
    assert mixed is None
    assert subject.imbalance == before
    assert [step for step in range(12, 30) if asks(subject, step)] == [21]


def test_nothing_is_asked_for_while_a_placement_is_computed() -> None:
    subject = balancer()
    assert report(subject, 10, HOT) is not None

    assert not any(asks(subject, step) for step in range(11, 40))
    subject.decide(None)
    assert asks(subject, 40)


def test_a_placement_that_saves_too_little_is_not_sent() -> None:
    subject = balancer(RebalancePolicy(interval_steps=10, min_tokens_per_expert=1, min_gain=0.9))
    found = report(subject, 10, HOT)
    assert found is not None

    assert subject.decide(subject.plan(found)) is None
    assert subject.num_rebalances_total == 0


def test_few_tokens_are_added_up_until_they_say_something() -> None:
    subject = balancer(RebalancePolicy(interval_steps=10, min_tokens_per_expert=30))

    assert report(subject, 10, HOT) is None
    assert subject.imbalance == 1
    assert report(subject, 20, HOT) is not None


def test_layers_that_are_level_stay_as_they_are() -> None:
    subject = balancer(num_layers=2)
    assert asks(subject, 10)
    loads = [StepResult(10, rank, expert_loads=[HOT[rank], LEVEL[rank]]) for rank in range(4)]

    found = subject.take(loads)
    assert found is not None
    placement = subject.plan(found)

    assert placement is not None
    assert placement[0] != found.placement[0]
    assert placement[1] == found.placement[1]


def test_ranks_that_report_another_shape_are_an_error() -> None:
    subject = balancer()
    assert asks(subject, 10)

    with pytest.raises(EngineError, match="rank 1 reported loads of 1 layers and 3 experts, expected 1 and 2"):
        subject.take(results(10, [[1, 1], [1, 1, 1], [1, 1], [1, 1]]))


def test_ranks_that_share_an_expert_are_counted_once() -> None:
    layout = ParallelLayout(tp=2, dp=2, expert_tp=2)
    subject = ExpertBalancer(ModelExperts(num_experts=4, num_layers=1), layout, ["a", "a", "b", "b"], POLICY)
    assert asks(subject, 10)

    found = subject.take(results(10, [[50, 40], [50, 40], [1, 2], [1, 2]]))

    assert found is not None
    assert found.loads == [[50, 40, 1, 2]]
    assert subject.grid.nodes == (0, 1)


@pytest.mark.parametrize(
    ("experts", "layout", "interval_steps"),
    [
        (None, LAYOUT, 10),
        (ModelExperts(num_experts=4, num_layers=1), ParallelLayout(), 10),
        (ModelExperts(num_experts=4, num_layers=1), ParallelLayout(tp=2, expert_tp=2), 10),
        (ModelExperts(num_experts=4, num_layers=1), LAYOUT, 0),
    ],
)
def test_where_there_is_nothing_to_balance_there_is_no_balancer(
    experts: ModelExperts | None, layout: ParallelLayout, interval_steps: int
) -> None:
    policy = RebalancePolicy(interval_steps=interval_steps)

    assert make_balancer(experts, layout, ["a"] * layout.world_size, policy) is None


def test_the_first_placement_is_the_one_that_ranks_start_with() -> None:
    assert balancer(num_layers=3).placement == [initial_placement(6, 2, 4)] * 3
