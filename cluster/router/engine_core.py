"""What one copy decides: its requests, its plans, and what becomes of both when its ranks are lost.

Hops 5 and 10, sans IO: events in, decisions out, without a clock, a socket or an await. `engine.py` drives it with real
ranks, the simulation with random ones. A loss of ranks ends no sequence: all are put through the model again, from
the tokens that are known here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from cluster.errors import EngineError, MullError, NotReady, RankLossCause, RankLost
from cluster.router.blocks import BlockAllocator
from cluster.router.copy_scheduler import CopyScheduler
from cluster.router.host_tier import HostPlan, HostTier
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.scheduler_stats import SchedulerStats
from cluster.router.sequence import SequenceRequest, SequenceUpdate
from cluster.router.supervision import EngineState, RestartPolicy, Supervisor
from workers.step import StepPlan, StepResult

log = logging.getLogger(__name__)

YOUNG_STEPS = 8
"""Ranks that are killed within so many steps of their start may have been killed for what they computed."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """KV blocks of each attention group."""

    num_groups: int
    num_blocks: int
    block_size: int
    host: HostPlan | None = None
    """Of their hosts' memory; None: no KV is kept there."""


@dataclass(frozen=True)
class Loss:
    """What follows from a loss of ranks."""

    wait_s: float | None
    """Until the next start; None: there is none, all that is live must end."""
    given_up: list[SequenceUpdate]
    """The ends of those who have brought down the ranks more than once."""


class EngineCore:
    """The scheduler of a copy, over as many lives of its ranks as it takes."""

    def __init__(self, config: SchedulerConfig, policy: RestartPolicy, *, enable_prefix_cache: bool = True) -> None:
        self.num_steps_total = 0
        self.num_restarts_total = 0
        self.num_replayed_tokens_total = 0
        self.num_given_up_total = 0
        self.num_ranks_lost_total: Counter[RankLossCause] = Counter()
        self._config = config
        self._enable_prefix_cache = enable_prefix_cache
        self._supervisor = Supervisor(policy)
        self._scheduler: CopyScheduler | None = None
        self.pool: Pool | None = None
        """None before the first start."""
        self._num_steps_of_life: int | None = None
        """Of the present ranks; None while there are none."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output that the model and its operator allow."""
        return self._config.max_model_len

    @property
    def state(self) -> EngineState:
        return self._supervisor.state

    @property
    def reason(self) -> str:
        """Why it is not ready; empty when it is."""
        return self._supervisor.reason

    @property
    def context_limit(self) -> int | None:
        """Longest prompt plus output that can run, in tokens: known once the KV pool is."""
        return self._scheduler.context_limit if self._scheduler else None

    @property
    def stats(self) -> SchedulerStats | None:
        """None before the first start, and at the end."""
        return self._scheduler.stats if self._scheduler else None

    @property
    def scheduler(self) -> CopyScheduler | None:
        """None before the first start, and at the end."""
        return self._scheduler

    @property
    def num_in_flight(self) -> int:
        """Plans whose results are not back."""
        return self._scheduler.num_in_flight if self._scheduler else 0

    # Requests

    def add(self, request: SequenceRequest) -> None:
        """Raises NotReady, Overloaded or a RequestError.

        While ranks start again, only those are taken who have output already: they wait like all who are live.
        """
        is_back_soon = self.state is EngineState.RESTARTING and bool(request.output_ids)
        if self._scheduler is None or not (self.state is EngineState.READY or is_back_soon):
            raise NotReady(self.reason)
        self._scheduler.add(request)

    def cancel(self, key: Hashable) -> SequenceUpdate | None:
        """Its blocks are free on return. The last update of the sequence, or None where it is not live."""
        return self._scheduler.cancel(key) if self._scheduler else None

    def set_budget(self, key: Hashable, thinking_budget: int) -> None:
        """Thinking tokens at most from now on; nothing happens where the sequence is not live."""
        if self._scheduler is not None:
            self._scheduler.set_budget(key, thinking_budget)

    # Ranks

    def on_started(self, pool: Pool) -> None:
        """Ranks can take plans. Raises EngineError where these cannot go on with what was begun."""
        blocks = [
            BlockAllocator(
                pool.num_blocks,
                pool.block_size,
                self._enable_prefix_cache,
                None if pool.host is None else HostTier(pool.host),
            )
            for _ in range(pool.num_groups)
        ]
        if self._scheduler is None:
            self._scheduler = CopyScheduler(self._config, blocks)
        else:
            self._check_same(pool)
            num_tokens = self._scheduler.restart(blocks)
            self.num_replayed_tokens_total += num_tokens
            log.info("%d sequences go on, %d tokens are computed again", self._scheduler.num_unfinished, num_tokens)
        self.pool = pool
        self._num_steps_of_life = 0
        self._supervisor.started()

    def next_plans(self) -> list[StepPlan] | None:
        """The next step, a plan for each group; None: nothing to send now, or enough is under way."""
        return self._scheduler.schedule() if self._scheduler else None

    def on_results(self, results: Sequence[StepResult]) -> list[SequenceUpdate]:
        """All ranks have answered the oldest plan. Raises EngineError where the answer does not fit it."""
        assert self._scheduler is not None, "a result came before ranks had started"
        assert self._num_steps_of_life is not None, "a result came after the ranks were lost"
        self.num_steps_total += 1
        self._num_steps_of_life += 1
        self._supervisor.stepped()
        # The first rank of each group names its tokens.
        return self._scheduler.apply(results[:: len(results) // self._scheduler.num_groups])

    def on_lost(self, error: Exception) -> Loss:
        """The ranks are gone, or could not start."""
        if isinstance(error, RankLost):
            self.num_ranks_lost_total[error.cause] += 1
        wait_s = self._supervisor.lost(_words(error))
        if wait_s is None or self._scheduler is None:
            self.close()
            return Loss(wait_s, [])
        self.num_restarts_total += 1
        num_steps, self._num_steps_of_life = self._num_steps_of_life, None
        if num_steps is None:
            return Loss(wait_s, [])  # it did not even start: nothing of ours was computed
        was_killed = isinstance(error, RankLost) and error.was_killed
        given_up = self._scheduler.blame(is_suspicious=not was_killed or num_steps < YOUNG_STEPS)
        self.num_given_up_total += len(given_up)
        return Loss(wait_s, given_up)

    def fail(self, error: Exception) -> None:
        """Nothing can be started any more."""
        self._supervisor.failed(_words(error))
        self.close()

    def stop(self) -> None:
        self._supervisor.stopped()

    def close(self) -> None:
        """Forget all sequences."""
        self._scheduler = None

    def _check_same(self, pool: Pool) -> None:
        old = self.pool
        assert old is not None
        if (pool.num_groups, pool.block_size) != (old.num_groups, old.block_size) or pool.num_blocks < old.num_blocks:
            raise EngineError(
                f"ranks that were started again have {pool.num_groups} groups of {pool.num_blocks} blocks of "
                f"{pool.block_size} tokens, before it were {old.num_groups} of {old.num_blocks} of {old.block_size}; "
                "free the memory that something else has taken"
            )


def _words(error: Exception) -> str:
    if isinstance(error, MullError):
        return str(error)
    return f"a fault in the Router: {type(error).__name__}: {error}"
