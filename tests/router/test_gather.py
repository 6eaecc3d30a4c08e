"""Which steps are complete, and which rank is to blame: pure."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import EngineError, RankLossCause
from cluster.router.gather import Casualties, RankEnd, StepGather
from workers.layout import ParallelLayout
from workers.step import StepResult

KILLED = RankEnd("was killed by SIGKILL", was_killed=True)


@given(st.integers(1, 4), st.integers(0, 6), st.data())
def test_steps_complete_in_order_whatever_the_order_of_the_ranks(
    world: int, num_steps: int, data: st.DataObject
) -> None:
    gather = StepGather(ParallelLayout(tp=world))
    for step in range(num_steps):
        gather.sent(step)
    answers = {rank: deque(range(num_steps)) for rank in range(world)}
    completed: list[int] = []

    while any(answers.values()):
        rank = data.draw(st.sampled_from([rank for rank, steps in answers.items() if steps]))
        results = gather.answered(StepResult(answers[rank].popleft(), rank, [rank]))
        if results is not None:
            assert [result.rank for result in results] == list(range(world))
            completed.append(results[0].step)

    assert completed == list(range(num_steps))
    assert not gather.has_open_steps


def test_the_late_ranks_are_those_that_the_oldest_step_waits_for() -> None:
    gather = StepGather(ParallelLayout(tp=1, dp=3))
    gather.sent(0)
    gather.sent(1)

    gather.answered(StepResult(0, 1))
    gather.answered(StepResult(1, 1))

    assert gather.late_ranks == [0, 2]


@pytest.mark.parametrize(("step", "words"), [(1, "expected step 0"), (-1, "expected step 0")])
def test_an_answer_out_of_order_is_an_error(step: int, words: str) -> None:
    gather = StepGather(ParallelLayout(tp=2))
    gather.sent(0)
    gather.sent(1)

    with pytest.raises(EngineError, match=words):
        gather.answered(StepResult(step, 1))


def test_an_answer_to_nothing_is_an_error() -> None:
    with pytest.raises(EngineError, match="expected nothing"):
        StepGather(ParallelLayout()).answered(StepResult(0, 0))


def test_a_rank_that_vanished_is_blamed_for_the_errors_of_the_others() -> None:
    casualties = Casualties()
    casualties.failed(0, "RuntimeError: connection closed by peer")
    casualties.ended(0, RankEnd("exited with status 1", was_killed=False))
    casualties.ended(1, KILLED)

    assert str(casualties.verdict()) == "rank 1 was killed by SIGKILL"
    assert casualties.verdict().was_killed
    assert casualties.verdict().cause is RankLossCause.EXITED


def test_how_a_rank_ended_says_more_than_that_it_cannot_be_reached() -> None:
    casualties = Casualties()
    casualties.unreachable(0)
    unreachable = str(casualties.verdict())
    casualties.ended(0, KILLED)

    assert unreachable == "rank 0 cannot be reached"
    assert str(casualties.verdict()) == "rank 0 was killed by SIGKILL"


def test_a_rank_that_said_why_it_fails_is_quoted() -> None:
    casualties = Casualties()
    casualties.failed(1, "out of memory")
    casualties.ended(1, RankEnd("exited with status 1", was_killed=False))
    casualties.failed(0, "RuntimeError: connection closed by peer")

    assert str(casualties.verdict()) == "rank 1 failed: out of memory"
    assert not casualties.verdict().was_killed
    assert casualties.verdict().cause is RankLossCause.FAILED
