"""Which of the ranks that wait for one another keeps the others waiting: pure."""

from __future__ import annotations

import pytest

from cluster.router.late import Pulses, RollCall
from workers.layout import ParallelLayout
from workers.step import RankPulse


def pulses_of(layout: ParallelLayout, counts: list[tuple[int, int]]) -> Pulses:
    """Of each rank, its exchanges with all and with its group."""
    pulses = Pulses(layout)
    for rank, (num_exchanges, num_group_exchanges) in enumerate(counts):
        pulses.heard(RankPulse(rank, num_exchanges, num_group_exchanges), now_s=10.0)
    return pulses


def test_the_one_that_is_behind_with_its_exchanges_is_suspected() -> None:
    pulses = pulses_of(ParallelLayout(tp=3), [(7, 0), (6, 0), (7, 0)])
    assert pulses.suspects([0, 1, 2], now_s=10.5) == [1]


def test_a_silent_one_is_suspected_before_one_that_is_behind() -> None:
    pulses = Pulses(ParallelLayout(tp=3))
    pulses.heard(RankPulse(2, 9), now_s=5.0)
    pulses.heard(RankPulse(0, 3), now_s=10.0)

    assert pulses.suspects([0, 2], now_s=10.0) == [2]
    assert (pulses.silent(6.0, now_s=10.0), pulses.silent(4.0, now_s=10.0)) == (None, 2)


@pytest.mark.parametrize("idle", [0, 1])
def test_a_group_that_had_less_to_do_is_not_behind(idle: int) -> None:
    """Group 0 waits for its rank 1 in an exchange of its own, the other group for both in one of all ranks."""
    counts = [(6, 50), (6, 49), (7, 90 if idle else 3), (7, 90 if idle else 3)]
    assert pulses_of(ParallelLayout(tp=2, dp=2), counts).suspects([0, 1, 2, 3], now_s=10.0) == [1]


def test_all_are_suspected_that_have_begun_the_same_exchange() -> None:
    pulses = pulses_of(ParallelLayout(tp=2, dp=2), [(7, 50), (7, 50), (7, 3), (7, 3)])
    assert pulses.suspects([0, 1, 2, 3], now_s=10.0) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("awake", "hanging", "blamed"), [([0, 2], [1], 1), ([0], [1, 2], 2), ([], [0, 1, 2], 2), ([0, 1, 2], [], 2)]
)
def test_who_does_not_wake_hangs_and_a_suspect_is_blamed_first(
    awake: list[int], hanging: list[int], blamed: int
) -> None:
    roll_call = RollCall([0, 1, 2], suspects=[2])
    for rank in awake:
        roll_call.heard(rank)
    assert (roll_call.hanging, roll_call.blamed) == (hanging, blamed)
