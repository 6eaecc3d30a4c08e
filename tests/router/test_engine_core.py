"""What becomes of sequences when ranks are lost, without any ranks: pure."""

from __future__ import annotations

import pytest

from cluster.errors import EngineError, NotReady, RankLost
from cluster.router.engine_core import YOUNG_STEPS, EngineCore, Pool
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import FinishReason, SequenceUpdate
from cluster.router.supervision import EngineState, RestartPolicy
from tests.fakes import FakeRanks, generate_alone
from tests.router.fake_copy import request

CONFIG = SchedulerConfig(max_model_len=200, max_num_seqs=4, max_num_batched_tokens=16, max_waiting=8)
POOL = Pool(num_groups=1, num_blocks=64, block_size=4)
KILLED = RankLost("rank 1 was killed by SIGKILL", rank=1, was_killed=True)
FAILED = RankLost("rank 1 failed: no such kernel", rank=1)


class Copy:
    """A core, its present ranks, and what its sequences got."""

    def __init__(self) -> None:
        self.core = EngineCore(CONFIG, RestartPolicy(max_restarts=3))
        self.token_ids: dict[object, list[int]] = {}
        self.finish: dict[object, FinishReason] = {}
        self.start()

    def start(self, pool: Pool = POOL) -> None:
        self.ranks = FakeRanks(num_blocks=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=16)
        self.core.on_started(pool)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            plans = self.core.next_plans()
            assert plans is not None
            self.take(self.core.on_results([self.ranks.execute(plans[0])]))

    def take(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            self.token_ids.setdefault(update.key, []).extend(update.token_ids)
            if update.finish is not None:
                self.finish[update.key] = update.finish

    def lose(self, error: Exception) -> float | None:
        loss = self.core.on_lost(error)
        self.take(loss.given_up)
        return loss.wait_s

    def lose_in_a_step(self, error: Exception) -> float | None:
        assert self.core.next_plans() is not None
        return self.lose(error)


def test_sequences_outlive_any_number_of_killed_ranks_that_had_worked_for_a_while() -> None:
    copy = Copy()
    asked = request("a", [1, 2, 3], max_tokens=120)
    copy.core.add(asked)

    for _ in range(8):
        copy.step(YOUNG_STEPS)
        assert copy.lose_in_a_step(KILLED) == 0
        copy.start()
    while "a" not in copy.finish:
        copy.step()

    assert copy.token_ids["a"] == generate_alone(asked, context_limit=200)[0]
    assert copy.core.num_restarts_total == 8
    assert copy.core.num_given_up_total == 0


def test_who_is_computed_at_two_failures_is_given_up() -> None:
    copy = Copy()
    copy.core.add(request("a", [1, 2, 3], max_tokens=20))

    copy.lose_in_a_step(FAILED)
    copy.start()
    copy.lose_in_a_step(FAILED)

    assert copy.finish == {"a": FinishReason.GIVEN_UP}
    assert copy.core.num_given_up_total == 1


def test_ranks_killed_at_once_again_and_again_are_a_request_s_doing() -> None:
    copy = Copy()
    copy.core.add(request("a", [1, 2, 3], max_tokens=20))

    copy.lose_in_a_step(KILLED)
    copy.start()
    copy.lose_in_a_step(KILLED)

    assert copy.finish == {"a": FinishReason.GIVEN_UP}


def test_a_restart_that_fails_is_nobody_s_fault() -> None:
    copy = Copy()
    copy.core.add(request("a", [1, 2, 3], max_tokens=20))
    copy.lose_in_a_step(FAILED)

    copy.lose(FAILED)
    copy.lose(FAILED)
    copy.start()
    copy.step(3)

    assert copy.finish == {}
    assert len(copy.token_ids["a"]) == 3


def test_when_it_gives_up_nothing_is_live_any_more() -> None:
    copy = Copy()
    copy.core.add(request("a", [1, 2, 3], max_tokens=20))
    copy.lose_in_a_step(KILLED)

    assert [copy.lose(KILLED) for _ in range(3)] == [0.5, 1.0, None]

    assert copy.core.state is EngineState.FAILED
    assert copy.core.stats is None
    with pytest.raises(NotReady, match="rank 1 was killed"):
        copy.core.add(request("b", [1], max_tokens=1))


def test_ranks_that_come_back_with_less_memory_are_refused_with_both_numbers() -> None:
    copy = Copy()
    copy.lose(KILLED)

    with pytest.raises(EngineError, match=r"groups of 60 blocks of 4 tokens, before it were 1 of 64 of 4"):
        copy.start(Pool(num_groups=1, num_blocks=60, block_size=4))


def test_what_was_cancelled_while_ranks_start_again_does_not_come_back() -> None:
    copy = Copy()
    copy.core.add(request("a", [1, 2, 3], max_tokens=20))
    copy.step(2)
    copy.lose(KILLED)

    cancelled = copy.core.cancel("a")
    copy.start()

    assert cancelled is not None
    assert cancelled.finish is FinishReason.CANCELLED
    assert copy.core.next_plans() is None
    assert copy.core.stats is not None
    assert copy.core.stats.num_free_blocks == POOL.num_blocks
