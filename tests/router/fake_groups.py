"""A copy of several attention groups without a model: the real CopyScheduler over `FakeRanks`, one for each group."""

from __future__ import annotations

from msgspec.structs import replace

from cluster.router.blocks import BlockAllocator
from cluster.router.copy_scheduler import CopyScheduler
from cluster.router.host_tier import HostPlan, HostTier
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import SequenceUpdate
from cluster.router.speculation import Speculation
from tests.fakes import FakeRanks
from tests.router.driven import Driven
from workers.step import StepPlan

DECODE_S = 0.040
PROMPT_TOKEN_S = 0.001


def num_prompt_tokens(plan: StepPlan) -> int:
    return sum(len(prefill.token_ids) for prefill in plan.prefills)


class FakeGroups(Driven[list[StepPlan], CopyScheduler]):
    """Several attention groups; what the copy says of itself is checked against what they say."""

    def __init__(
        self,
        num_groups: int,
        *,
        num_blocks: int = 16,
        block_size: int = 4,
        enable_prefix_cache: bool = True,
        vocab_size: int = 50,
        max_model_len: int = 1024,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 16,
        max_waiting: int = 256,
        max_in_flight: int = 2,
        num_speculative_tokens: int = 0,
        reach: int | None = None,
        max_prefill_slowdown: float | None = None,
        host: HostPlan | None = None,
    ) -> None:
        """`reach`: of the fake model, see `next_token`. Rows cost little, so that even doubtful drafts are tried.

        A step takes DECODE_S and PROMPT_TOKEN_S for each token of its longest prompts.
        """
        self.pools = [
            BlockAllocator(num_blocks, block_size, enable_prefix_cache, HostTier(host) if host else None)
            for _ in range(num_groups)
        ]
        config = SchedulerConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_waiting=max_waiting,
            max_in_flight=max_in_flight,
            speculation=Speculation(max_tokens=num_speculative_tokens, row_cost=0.02),
            max_prefill_slowdown=max_prefill_slowdown,
        )
        super().__init__(config, CopyScheduler(config, self.pools), vocab_size, reach)
        self.ranks = [
            FakeRanks(
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                vocab_size=vocab_size,
                group=group,
                reach=reach,
                num_host_blocks=host.num_blocks if host else 0,
            )
            for group in range(num_groups)
        ]

    def _schedule(self) -> list[StepPlan] | None:
        plans = self.scheduler.schedule()
        if plans is not None:
            assert [plan.step for plan in plans] == [len(self.steps)] * len(self.ranks), "a group is left out"
        return plans

    def _execute(self, step: list[StepPlan]) -> list[SequenceUpdate]:
        results = [ranks.execute(plan) for ranks, plan in zip(self.ranks, step, strict=True)]
        step_s = DECODE_S + PROMPT_TOKEN_S * max(num_prompt_tokens(plan) for plan in step)
        return self.scheduler.apply([replace(result, compute_s=step_s) for result in results])

    def check_books(self) -> None:
        """Nobody is lost between queue and groups, and the figures are the groups' summed."""
        stats = self.scheduler.stats
        unfinished = len(self.requests) - len(self.finish)
        assert self.scheduler.num_unfinished == stats.num_running + stats.num_waiting == unfinished
        assert stats.num_running <= self.config.max_num_seqs * len(self.ranks)
        assert stats.num_free_blocks == sum(pool.num_free for pool in self.pools)
