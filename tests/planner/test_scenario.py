"""What happens to a fleet does to requests what the product does to them, and loses none that it would not lose."""

from __future__ import annotations

import argparse

import pytest

from cluster.errors import ConfigError
from cluster.planner.cell import Scenario
from cluster.planner.command import add_plan_command, make_plan
from cluster.planner.devices import find_device, published_kernels
from cluster.planner.fleet import Fleet
from cluster.planner.layouts import Candidate, Fit, Limits, fit
from cluster.planner.load import DrawnLoad
from cluster.planner.operations import known_operations
from cluster.planner.scaling import Autoscaler
from cluster.planner.scenario import Course, follow
from cluster.planner.scenario_flags import check_fleet
from cluster.planner.setting import Setting
from cluster.planner.simulate import copy_maker
from cluster.planner.upsets import Operator, Upset
from cluster.planner.workload import Arrival, Lengths
from tests.real_models import QWEN3_235B
from workers.layout import ParallelLayout

H200 = find_device("h200")
SETTING = Setting(model=QWEN3_235B, device=H200, kernels=published_kernels())
OPERATIONS = known_operations(node_s=0.0)
LIMITS = Limits(max_num_seqs=16, max_num_batched_tokens=2048, context=4096)
LOAD = DrawnLoad(rate_per_s=1.0, lengths=Lengths(prompt=200, thinking=200, answer=50))


def copies_of(num_copies: int) -> Fit:
    return fit(QWEN3_235B, Candidate(layout=ParallelLayout(tp=4), copies=num_copies), H200, LIMITS)


def fleet_of(num_copies: int, *, patience_s: float | None = None) -> tuple[Fleet, Operator]:
    candidate = copies_of(num_copies)
    fleet = Fleet(copy_maker(candidate, SETTING.cost(candidate)), num_copies, patience_s=patience_s)
    return fleet, Operator(fleet, candidate, H200, OPERATIONS)


def arrivals(count: int, every_s: float) -> list[Arrival]:
    return [Arrival(index * every_s, 100, 200, 50) for index in range(count)]


def course(num_copies: int, *upsets: Upset, load: DrawnLoad = LOAD) -> Course:
    return follow(SETTING, copies_of(num_copies), load, Scenario(duration_s=300, upsets=upsets), OPERATIONS)


def test_requests_of_a_lost_rank_stand_still_until_it_is_back_and_are_computed_again() -> None:
    fleet, operator = fleet_of(1)
    operator.arrange(Upset(time_s=3.0, kind="lose-rank"))

    fleet.run(arrivals(4, every_s=0.5))

    back_s = 3.0 + OPERATIONS.starting.rank_s(copies_of(1))
    for flight in fleet.flights:
        ((since_s, until_s),) = flight.pauses
        assert since_s == 3.0
        assert until_s == pytest.approx(back_s, abs=1.0)
        assert flight.end_s is not None
        assert flight.num_moves == 0
    # Prompts and what had come of the outputs: at most three seconds of it.
    assert 4 * 100 < fleet.copies["copy-1"].work.recomputed_tokens < 4 * (100 + 150)


def test_a_silent_rank_is_noticed_when_a_step_has_lasted_too_long_and_takes_requests_until_then() -> None:
    fleet, operator = fleet_of(1)
    operator.arrange(Upset(time_s=3.0, kind="silent-rank"))

    fleet.run(arrivals(8, every_s=1.0))

    back_s = 3.0 + OPERATIONS.router.step_timeout_s + OPERATIONS.starting.rank_s(copies_of(1))
    for flight in fleet.flights[:3]:
        ((since_s, until_s),) = flight.pauses
        assert since_s == 3.0
        assert until_s == pytest.approx(back_s, abs=1.0)
    for flight in fleet.flights[4:]:  # they came when nobody knew
        assert not flight.was_refused
        assert flight.first_token_s == pytest.approx(back_s, abs=1.0)


def test_a_copy_that_autoscaling_adds_waits_for_its_node() -> None:
    ready_at: list[float] = []
    for node_s in (0.0, 120.0):
        fleet, _ = fleet_of(1)
        operator = Operator(fleet, copies_of(1), H200, known_operations(node_s=node_s))
        operator.add_copies(1, "one more")
        fleet.run(arrivals(300, every_s=1.0), until_s=operator.copy_start_s + node_s - 1.0)
        assert sum(copy.is_open for copy in fleet.copies.values()) == 1
        fleet.run(arrivals(300, every_s=1.0), until_s=operator.copy_start_s + node_s + 1.0)
        ready_at.append(fleet.now_s)
        assert sum(copy.is_open for copy in fleet.copies.values()) == 2
    assert ready_at[1] - ready_at[0] == pytest.approx(120.0, abs=2.0)


def test_requests_of_a_lost_router_go_on_at_another_copy_at_once() -> None:
    fleet, operator = fleet_of(2)
    operator.arrange(Upset(time_s=3.0, kind="lose-router"))

    fleet.run(arrivals(4, every_s=0.5))

    moved = [flight for flight in fleet.flights if flight.num_moves]
    assert len(moved) == 2
    for flight in moved:
        ((_, until_s),) = flight.pauses
        assert until_s < 4.0
    assert all(flight.end_s is not None for flight in fleet.flights)


def test_without_another_copy_what_has_begun_waits_and_what_is_new_gives_up() -> None:
    fleet, operator = fleet_of(1, patience_s=4.0)
    operator.arrange(Upset(time_s=3.0, kind="lose-router"))

    fleet.run(arrivals(8, every_s=1.0))

    begun, new = fleet.flights[:3], fleet.flights[3:]
    assert all(flight.end_s is not None and flight.num_moves == 1 for flight in begun)
    assert [flight.was_refused for flight in new] == [True] * 5


def test_a_rolling_update_replaces_every_copy_and_loses_no_request() -> None:
    fleet, operator = fleet_of(3)
    operator.arrange(Upset(time_s=5.0, kind="rolling-update"))
    ready: list[int] = []
    for second in range(1, 300):
        fleet.at(second, lambda: ready.append(sum(copy.is_open for copy in fleet.copies.values())))

    fleet.run(arrivals(300, every_s=1.0))

    assert sorted(fleet.copies) == ["copy-4", "copy-5", "copy-6"]
    assert min(ready) == 2  # a fifth of three is none: it is one at a time
    assert all(flight.end_s is not None for flight in fleet.flights)


def test_a_router_that_drains_ends_as_soon_as_it_has_nothing_left() -> None:
    fleet, operator = fleet_of(2)
    left: list[float] = []
    fleet.at(1.0, lambda: operator.drain(fleet.copies[fleet.flights[0].copy], lambda: left.append(fleet.now_s)))

    fleet.run([Arrival(0.0, 100, 0, 100), Arrival(0.0, 100, 0, 2000)])

    ended_s = fleet.flights[0].end_s
    assert ended_s is not None
    assert ended_s <= left[0] <= ended_s + 1.0
    assert not any(flight.num_moves for flight in fleet.flights)


def test_copies_are_added_when_they_were_full_for_long_enough_and_removed_again() -> None:
    fleet, operator = fleet_of(1)
    Autoscaler(fleet, operator, OPERATIONS, least=1, most=3, slots=LIMITS.max_num_seqs).start()
    busy = arrivals(1200, every_s=0.25)  # more than twice of what a copy has slots for
    calm = [Arrival(320.0 + 30 * index, 100, 200, 50) for index in range(60)]

    fleet.run([*busy, *calm])

    words = [one.words for one in operator.log]
    assert words[0] in ("1 copies become 2", "1 copies become 3")
    assert words[-1].endswith("become 1")
    assert operator.log[0].time_s >= OPERATIONS.router.upscale_delay_s
    assert operator.log[-1].time_s - busy[-1].time_s >= OPERATIONS.router.downscale_delay_s
    assert all(flight.end_s is not None for flight in fleet.flights)


def test_columns_of_a_course_are_of_one_length_and_count_every_request() -> None:
    result = course(1, Upset(time_s=100.0, kind="lose-rank"))

    series = result.as_json()["series"]
    assert {len(column) for column in series.values()} == {len(series["time_s"])}
    assert sum(series["arrivals"]) == pytest.approx(300, rel=0.2)
    assert max(series["waiting"]) > 0
    (effect,) = result.effects
    assert effect.what == "lose-rank"
    assert effect.paused > 0
    assert effect.moved == 0
    assert effect.settled_after_s is not None
    assert effect.settled_after_s > OPERATIONS.starting.rank_s(copies_of(1)) - 2.0  # it is looked every two seconds


def test_each_part_of_the_control_plane_is_told_of_its_own_busiest_moment() -> None:
    result = course(2, Upset(time_s=100.0, kind="lose-router"))

    used = {part.part: part.used for part in result.parts}
    assert used["busiest Router's core"] == max(result.series["router_cpu"])
    assert used["gateway's core"] == max(result.series["gateway_cpu"])
    # One Router with the streams of two is at its busiest when the fleet as a whole is not.
    most = max(result.series["output_tokens_per_s"])
    assert result.series["router_cpu"][result.series["output_tokens_per_s"].index(most)] < max(
        result.series["router_cpu"]
    )


def test_a_doubled_load_comes_twice_as_often() -> None:
    series = course(2, Upset(time_s=150.0, kind="double-load")).series

    before = sum(count for time_s, count in zip(series["time_s"], series["arrivals"], strict=True) if time_s < 150)
    assert sum(series["arrivals"]) - before == pytest.approx(2 * before, rel=0.3)


def test_the_same_seed_gives_the_same_course() -> None:
    upsets = Upset(time_s=60.0, kind="lose-router"), Upset(time_s=120.0, kind="rolling-update")

    one, other = (course(3, *upsets).as_json() for _ in range(2))

    assert one["series"] == other["series"]
    assert one["events"] == other["events"]


def test_cells_give_the_same_course_in_however_many_processes() -> None:
    scenario = Scenario(
        duration_s=60,
        upsets=[Upset(time_s=20.0, kind="lose-router"), Upset(time_s=40.0, kind="double-load")],
        num_cells=2,
    )

    one, other = (
        follow(SETTING, copies_of(4), LOAD, scenario, OPERATIONS, num_processes=count).as_json() for count in (1, 2)
    )

    for course in (one, other):
        del course["simulation"]["wall_s"], course["simulation"]["cpu_s"], course["simulation"]["requests_per_minute"]
    assert one == other
    assert max(one["series"]["copies"]) == 4
    assert sum(one["series"]["arrivals"]) == pytest.approx(60 + 20, rel=0.3)  # both cells' parts, and twice of it
    assert len(one["events"]) == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--copies", "4", "--cells", "3"], "--copies 4 is not divisible by --cells 3"),
        (["--copies", "4", "--cells", "2", "--gateways", "5"], "--gateways 5 is not divisible by --cells 2"),
        (["--copies", "4", "--node-start", "2m"], "--node-start is of copies that autoscaling adds"),
    ],
)
def test_a_fleet_that_cannot_be_split_is_refused(words: list[str], problem: str) -> None:
    parser = argparse.ArgumentParser()
    add_plan_command(parser)

    with pytest.raises(ConfigError, match=problem):
        make_plan(parser.parse_args(["qwen3-235b", "--gpus", "16", "--rate", "1/s", "--for", "60s", *words]))


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        (Scenario(duration_s=60, max_copies=1), "--max-copies 1 is below the 2 copies of 2 × tp=4, the best layout"),
        (Scenario(duration_s=60, num_cells=3), "2 copies of 2 × tp=4, the best layout, are not divisible by --cells 3"),
    ],
)
def test_a_fleet_that_does_not_suit_the_best_layout_is_refused(scenario: Scenario, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_fleet(scenario, copies_of(2).candidate)


def test_tenants_share_the_load_unevenly_and_are_told_one_by_one() -> None:
    load = DrawnLoad(rate_per_s=2.0, lengths=LOAD.lengths, tenants=4, shared_prompt_tokens=128)

    tenants = course(2, load=load).tenants

    assert [tenant.tenant for tenant in tenants] == ["tenant-1", "tenant-2", "tenant-3", "tenant-4"]
    assert tenants[0].requests > 2 * tenants[3].requests


def test_a_rank_that_falls_silent_where_another_is_silent_already_is_of_another_copy_or_nothing_more() -> None:
    fleet, operator = fleet_of(1)
    for time_s in (3.0, 20.0):
        operator.arrange(Upset(time_s=time_s, kind="silent-rank"))
    operator.arrange(Upset(time_s=40.0, kind="lose-rank"))  # before it was noticed: all its ranks start anew

    fleet.run(arrivals(8, every_s=1.0))

    back_s = 40.0 + OPERATIONS.starting.rank_s(copies_of(1))
    assert [one.words for one in operator.log][1] == "no copy took work: nothing more fell silent"
    for flight in fleet.flights[:3]:
        ((_, until_s),) = flight.pauses
        assert until_s == pytest.approx(back_s, abs=1.0)


def test_what_is_moved_is_told_of_the_loss_that_moved_it_and_nobody_stands_still_when_it_is_settled() -> None:
    (router,) = course(2, Upset(time_s=100.0, kind="lose-router")).effects
    rank, same = course(1, *[Upset(time_s=100.0, kind="lose-rank")] * 2).effects

    assert router.moved == router.paused > 0
    assert rank.pause_max_s is not None
    assert rank.settled_after_s is not None
    assert rank.settled_after_s >= rank.pause_max_s
    assert same.paused == rank.paused > 0


def test_streams_that_stand_still_at_the_end_are_counted() -> None:
    (effect,) = course(1, Upset(time_s=290.0, kind="lose-rank")).effects

    assert effect.paused > 0
    assert effect.pause_max_s is None
    assert effect.settled_after_s is None


def test_an_update_goes_on_when_autoscaling_takes_copies_away_meanwhile() -> None:
    fleet, operator = fleet_of(4)
    operator.arrange(Upset(time_s=5.0, kind="rolling-update"))
    fleet.at(6.0, lambda: operator.remove_copies(1, "one less"))

    fleet.run([Arrival(0.0, 100, 100, 2000)] * 8 + arrivals(400, every_s=1.0))

    assert len(fleet.copies) == 3
    assert not {"copy-1", "copy-2", "copy-3", "copy-4"} & set(fleet.copies)
