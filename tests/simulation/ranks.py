"""The ranks of one copy, from their start to their loss: plans in, results out, after random times.

A token is a pure function of what the plans wrote into the blocks that the sequence's table names (see `FakeRanks`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import RankLost
from cluster.router.engine_core import Pool
from tests.fakes import FakeRanks
from tests.simulation.world import World
from workers.step import StepPlan, StepResult

LONGEST_STEP_S = 0.006
STEP_TIMEOUT_S = 0.060
LONGEST_LOAD_S = 0.060
LONGEST_DEATH_UNNOTICED_S = 0.020


@dataclass(frozen=True, kw_only=True)
class CopyShape:
    """What a copy is made of."""

    pool: Pool
    ranks_per_group: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    poison_id: int
    """A prefill with this token kills the ranks that compute it."""


class SimRanks:
    """All ranks of a copy. Tells `on_ready` once, then `on_results` step by step, and at the end `on_lost` once."""

    def __init__(
        self,
        world: World,
        name: str,
        shape: CopyShape,
        *,
        on_ready: Callable[[], object],
        on_results: Callable[[list[StepResult]], object],
        on_lost: Callable[[RankLost], object],
    ) -> None:
        pool = shape.pool
        self._world, self._name, self._shape = world, name, shape
        self._on_results, self._on_lost = on_results, on_lost
        self._groups = [
            FakeRanks(
                num_blocks=pool.num_blocks,
                block_size=pool.block_size,
                max_num_seqs=shape.max_num_seqs,
                max_num_batched_tokens=shape.max_num_batched_tokens,
                vocab_size=shape.poison_id,  # nobody samples the poison
                group=group,
            )
            for group in range(pool.num_groups)
        ]
        self._is_dead = False
        self._hangs = False
        self._is_lost = False
        self._last_done_s = 0.0
        world.after(world.random.random() * LONGEST_LOAD_S, lambda: None if self._is_dead else on_ready())

    def send(self, plans: list[StepPlan]) -> None:
        """Compute a step, after those that were sent before."""
        world = self._world
        if self._is_dead or self._hangs:
            return
        done_s = max(self._last_done_s, world.now_s) + world.random.random() * LONGEST_STEP_S
        self._last_done_s = done_s
        world.at(done_s, lambda: self._execute(plans))

    def kill(self) -> None:
        """One of them dies, and with it what all were doing."""
        if not self._is_dead:
            self._is_dead = True
            delay_s = self._world.random.random() * LONGEST_DEATH_UNNOTICED_S
            self._world.after(delay_s, lambda: self._lose("rank 1 was killed", was_killed=True))

    def hang(self) -> None:
        """One of them stops in the middle; that is noticed after the time that a step may take."""
        if not self._is_dead and not self._hangs:
            self._hangs = True
            self._world.after(STEP_TIMEOUT_S, lambda: self._lose("rank 1 is late", was_killed=False))

    def abandon(self) -> None:
        """Their Router is gone, and they go with it."""
        self._is_dead = self._is_lost = True

    def _execute(self, plans: list[StepPlan]) -> None:
        if self._is_dead or self._hangs:
            return
        if any(self._shape.poison_id in prefill.token_ids for plan in plans for prefill in plan.prefills):
            self._is_dead = True
            self._world.tell("%s: step %d is poisoned", self._name, plans[0].step)
            self._lose("rank 0 failed", was_killed=False)
            return
        results: list[StepResult] = []
        for group, plan in zip(self._groups, plans, strict=True):
            first = group.execute(plan)
            results += [first] + [StepResult(plan.step, first.rank)] * (self._shape.ranks_per_group - 1)
        self._on_results(results)

    def _lose(self, message: str, *, was_killed: bool) -> None:
        if not self._is_lost:
            self._is_dead = self._is_lost = True
            self._on_lost(RankLost(message, rank=1, was_killed=was_killed))
