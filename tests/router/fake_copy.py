"""A copy without a model: the real scheduler over `FakeRanks`, and what its clients have got so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from cluster.router.blocks import BlockAllocator
from cluster.router.host_tier import HostPlan, HostTier
from cluster.router.scheduler import Scheduler
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import Phase, SequenceRequest, SequenceUpdate
from cluster.router.speculation import Speculation
from tests.fakes import FakeRanks, next_token
from tests.router.driven import Driven
from workers.step import SamplingParams, StepPlan

PROMPT = list(range(10, 19))
"""9 tokens: two full blocks of 4, and one token."""


def request(key: Hashable, prompt_ids: list[int], *, max_tokens: int = 4, **more: Any) -> SequenceRequest:
    """A request that stops at nothing unless told so."""
    more.setdefault("sampling", SamplingParams(seed=7))
    return SequenceRequest(key=key, prompt_ids=prompt_ids, max_tokens=max_tokens, **more)


def first_token(prompt_ids: list[int]) -> int:
    """What the fake ranks sample after this prompt for `request`."""
    return next_token(prompt_ids, 7, 50)


class FakeCopy(Driven[StepPlan, Scheduler]):
    """One attention group; its books are checked block by block."""

    def __init__(
        self,
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
        row_cost: float = 0.02,
        reach: int | None = None,
        host: HostPlan | None = None,
    ) -> None:
        """`reach`: of the fake model, see `next_token`. Rows cost little, so that even doubtful drafts are tried."""
        self.host = host
        self.blocks = self._new_blocks(num_blocks, block_size, enable_prefix_cache)
        config = SchedulerConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_waiting=max_waiting,
            max_in_flight=max_in_flight,
            speculation=Speculation(max_tokens=num_speculative_tokens, row_cost=row_cost),
        )
        super().__init__(config, Scheduler(config, self.blocks), vocab_size, reach)
        self.ranks = self._new_ranks()

    @property
    def plans(self) -> list[StepPlan]:
        """All that were sent."""
        return self.steps

    def _schedule(self) -> StepPlan | None:
        return self.scheduler.schedule()

    def _execute(self, step: StepPlan) -> list[SequenceUpdate]:
        return self.scheduler.apply(self.ranks.execute(step))

    def _new_ranks(self) -> FakeRanks:
        return FakeRanks(
            num_blocks=self.blocks.num_blocks,
            block_size=self.blocks.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            vocab_size=self.vocab_size,
            reach=self.reach,
            num_host_blocks=self.host.num_blocks if self.host else 0,
        )

    def _new_blocks(self, num_blocks: int, block_size: int, enable_prefix_cache: bool) -> BlockAllocator:
        host = HostTier(self.host) if self.host else None
        return BlockAllocator(num_blocks, block_size, enable_prefix_cache, host)

    def lose_ranks(self) -> None:
        """Others take their place, with nothing computed; the plans under way have no results."""
        blocks = self.blocks
        self.blocks = self._new_blocks(blocks.num_blocks, blocks.block_size, blocks.enable_prefix_cache)
        self.ranks = self._new_ranks()
        self.in_flight.clear()
        self.scheduler.restart(self.blocks)
        self.check_books()

    def set_budget(self, key: Hashable, thinking_budget: int) -> None:
        """Lower or raise a budget; what is known by then cannot be taken back, so that `alone` must yield it, too."""
        thinking = [seq for seq in self.scheduler.sequences if seq.request.key == key and seq.phase is Phase.THINKING]
        for seq in thinking:
            effective = max(thinking_budget, seq.num_thinking)
            self.requests[key] = replace(self.requests[key], thinking_budget=effective)
        self.scheduler.set_budget(key, thinking_budget)
        self.check_books()

    def check_books(self) -> None:
        """Blocks are counted once per owner; arrival order of equals is admission order; limits hold."""
        sequences = list(self.scheduler.sequences)
        owners = Counter(block_id for seq in sequences for block_id in seq.block_ids)
        users = [self.blocks.num_users(block_id) for block_id in range(self.blocks.num_blocks)]
        assert users == [owners[block_id] for block_id in range(self.blocks.num_blocks)]
        assert self.blocks.num_free == users.count(0)
        if (host := self.blocks.host) is not None:
            readers = Counter(host_id for seq in sequences for host_id, _ in seq.fetches)
            assert host.num_reading == len(readers), "a host block is read by nobody, or by somebody unknown"
            assert all(seq.slot is not None or not seq.fetches for seq in sequences)
        slots = [seq.slot for seq in sequences if seq.slot is not None]
        assert len(slots) == len(set(slots)) == self.scheduler.num_running <= self.config.max_num_seqs
        assert self.scheduler.num_waiting == len(sequences) - len(slots)
        assert all(seq.slot is not None or not seq.block_ids for seq in sequences)
        for priority in {seq.request.priority for seq in sequences}:
            equals = [seq for seq in sequences if seq.request.priority == priority]
            admitted = [seq.was_admitted for seq in equals]
            runs = [seq.slot is not None for seq in equals if seq.phase is Phase.THINKING]
            assert runs == sorted(runs, reverse=True), "someone who thinks overtook an older request that thinks"
            assert admitted == sorted(admitted, reverse=True), "someone was admitted before an older request"
