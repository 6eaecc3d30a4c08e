"""The ranks of one copy, from their start to their loss: plans in, results out, after random times.

A token is a pure function of what the plans wrote into the blocks that the sequence's table names (see `FakeRanks`).
Who has answered, and who is to blame for a loss, the product's own `gather.py` and `late.py` find out from what they
are told here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import RankLost
from cluster.router.engine_core import Pool
from cluster.router.gather import Casualties, RankEnd, StepGather
from cluster.router.late import Pulses, RollCall
from tests.fakes import FakeRanks
from tests.simulation.streams import BrokenPromise
from tests.simulation.world import Timer, World
from workers.layout import ParallelLayout
from workers.step import RankPulse, StepPlan, StepResult

LONGEST_DELAY_S = 0.002
LONGEST_STEP_S = 0.004
STEP_TIMEOUT_S = 0.060
WAKE_TIMEOUT_S = 0.010
LONGEST_LOAD_S = 0.060
LONGEST_DEATH_UNNOTICED_S = 0.015
SETTLE_S = 0.020
"""What is known of a loss is judged so long after the first word of it: longer than a death stays unnoticed."""
KILLED = RankEnd("was killed by SIGKILL", was_killed=True)
FAILED = RankEnd("exited with status 1", was_killed=False)


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
    reach: int | None
    """Of the model, see `next_token`: with a short one it repeats itself, so that drafts are right at times."""

    @property
    def layout(self) -> ParallelLayout:
        return ParallelLayout(tp=self.ranks_per_group, dp=self.pool.num_groups)


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
                rank=group * shape.ranks_per_group,
                reach=shape.reach,
            )
            for group in range(pool.num_groups)
        ]
        self._num_ranks = shape.layout.world_size
        self._gather = StepGather(shape.layout)
        self._casualties, self._pulses = Casualties(), Pulses(shape.layout)
        self._culprits: set[int] = set()
        """Ranks that were hit: they compute nothing more, and nobody does without them."""
        self._is_over = False
        self._num_computed = 0
        self._last_done_s = 0.0
        self._last_answer_s = [0.0] * self._num_ranks
        self._deadline: Timer | None = None
        self._settling: Timer | None = None
        world.after(world.random.random() * LONGEST_LOAD_S, lambda: None if self._is_over else on_ready())

    def send(self, plans: list[StepPlan]) -> None:
        """Compute a step, after those that were sent before."""
        world = self._world
        self._gather.sent(plans[0].step)
        if self._deadline is None:
            self._set_deadline()
        arrives_s = world.now_s + world.random.random() * LONGEST_DELAY_S
        self._last_done_s = max(self._last_done_s, arrives_s) + world.random.random() * LONGEST_STEP_S
        world.at(self._last_done_s, lambda: self._execute(plans))

    def kill_one(self) -> None:
        """A rank dies; those that wait for it see their connections break."""
        rank = self._hit()
        self._soon(LONGEST_DEATH_UNNOTICED_S, lambda: self._casualties.ended(rank, KILLED))
        self._break_others()

    def hang_one(self) -> None:
        """A rank stops in the middle; the others begin an exchange that does not end. All tell how far they are."""
        hung = self._hit()
        self._world.tell("%s: it is rank %d", self._name, hung)
        for rank in range(self._num_ranks):
            self._beat(RankPulse(rank, self._num_computed + (rank not in self._culprits)))

    def _beat(self, pulse: RankPulse) -> None:
        delay_s = self._world.random.random() * STEP_TIMEOUT_S / 2
        self._world.after(delay_s, lambda: self._pulses.heard(pulse, self._world.now_s))

    def abandon(self) -> None:
        """Their Router is gone, and they go with it."""
        self._is_over = True

    # Steps

    def _execute(self, plans: list[StepPlan]) -> None:
        if self._culprits or self._is_over:
            return  # they wait for one that computes nothing
        if any(self._shape.poison_id in prefill.token_ids for plan in plans for prefill in plan.prefills):
            self._world.tell("%s: step %d is poisoned", self._name, plans[0].step)
            self._fail_one()
            return
        self._num_computed += 1
        for group, plan in zip(self._groups, plans, strict=True):
            named = group.execute(plan)
            self._answer_soon(named)
            for rank in range(group.rank + 1, group.rank + self._shape.ranks_per_group):
                self._answer_soon(StepResult(plan.step, rank))

    def _answer_soon(self, result: StepResult) -> None:
        world, rank = self._world, result.rank
        arrives_s = max(self._last_answer_s[rank], world.now_s + world.random.random() * LONGEST_DELAY_S)
        self._last_answer_s[rank] = arrives_s
        world.at(arrives_s, lambda: self._take(result))

    def _take(self, result: StepResult) -> None:
        if self._is_over:
            return
        complete = self._gather.answered(result)
        if complete is not None:
            self._set_deadline()
            self._on_results(complete)

    def _set_deadline(self) -> None:
        """The oldest step's time runs from when it became the oldest."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._gather.has_open_steps:
            self._deadline = self._world.after(STEP_TIMEOUT_S, self._on_deadline)

    # Losses

    def _hit(self) -> int:
        """One more that computes nothing from now on."""
        rank = self._world.random.randrange(self._num_ranks)
        self._culprits.add(rank)
        return rank

    def _fail_one(self) -> None:
        """A rank says what went wrong and ends; the others see their connections break."""
        rank = self._hit()
        self._casualties.failed(rank, "CUDA error")
        self._settle()
        self._soon(LONGEST_DEATH_UNNOTICED_S, lambda: self._casualties.ended(rank, FAILED))
        self._break_others()

    def _break_others(self) -> None:
        for rank in range(self._num_ranks):
            if rank not in self._culprits and self._world.chance(0.5):
                self._fail_soon(rank)

    def _fail_soon(self, rank: int) -> None:
        self._soon(LONGEST_DEATH_UNNOTICED_S, lambda: self._casualties.failed(rank, "connection closed by peer"))

    def _soon(self, longest_s: float, hear: Callable[[], object]) -> None:
        """Let something about a loss be heard."""

        def heard() -> None:
            hear()
            self._settle()

        self._world.after(self._world.random.random() * longest_s, heard)

    def _settle(self) -> None:
        if self._settling is None and not self._is_over:
            self._settling = self._world.after(SETTLE_S, lambda: self._lose(self._casualties.verdict()))

    def _on_deadline(self) -> None:
        if not self._is_over:
            late = self._gather.late_ranks
            suspects = self._pulses.suspects(late, self._world.now_s)
            if len(suspects) == 1:
                self._lose_late(suspects[0])
                return
            roll_call = RollCall(late, suspects)
            for rank in set(late) - self._culprits:
                roll_call.heard(rank)
            self._world.after(WAKE_TIMEOUT_S, lambda: self._lose_late(roll_call.blamed))

    def _lose_late(self, rank: int) -> None:
        self._lose(RankLost(f"rank {rank} was late", rank=rank))

    def _lose(self, error: RankLost) -> None:
        if self._is_over:
            return
        self._is_over = True
        if error.rank not in self._culprits:
            raise BrokenPromise(f"{self._name} blames rank {error.rank} ({error}), hit were {self._culprits}")
        self._on_lost(error)
