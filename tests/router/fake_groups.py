"""A copy of several attention groups without a model: the real CopyScheduler over `FakeRanks`, one for each group."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from cluster.router.blocks import BlockAllocator
from cluster.router.copy_scheduler import CopyScheduler
from cluster.router.scheduler import SchedulerConfig
from cluster.router.sequence import FinishReason, SequenceRequest, SequenceUpdate
from tests.fakes import FakeRanks, generate_alone
from workers.step import StepPlan, TokenLogprobs

MAX_STEPS = 100_000


class FakeGroups:
    """Drives steps there and back, and checks after every move what must always hold."""

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
    ) -> None:
        self.pools = [BlockAllocator(num_blocks, block_size, enable_prefix_cache) for _ in range(num_groups)]
        self.config = SchedulerConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_waiting=max_waiting,
            max_in_flight=max_in_flight,
        )
        self.scheduler = CopyScheduler(self.config, self.pools)
        self.ranks = [
            FakeRanks(
                num_blocks=num_blocks,
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                vocab_size=vocab_size,
                group=group,
            )
            for group in range(num_groups)
        ]
        self.in_flight: deque[list[StepPlan]] = deque()
        self.steps: list[list[StepPlan]] = []
        self.requests: dict[Hashable, SequenceRequest] = {}
        self.token_ids: dict[Hashable, list[int]] = {}
        self.logprobs: dict[Hashable, list[TokenLogprobs]] = {}
        self.admissions: list[Hashable] = []
        self.finish: dict[Hashable, FinishReason] = {}

    def add(self, new: SequenceRequest) -> None:
        self.scheduler.add(new)
        self.requests[new.key] = new
        self.token_ids[new.key] = []
        self.logprobs[new.key] = []
        self.check_books()

    def cancel(self, key: Hashable) -> None:
        update = self.scheduler.cancel(key)
        assert (update is None) == (key in self.finish)
        if update is not None:
            self._take(update)
        self.check_books()

    def send(self) -> list[StepPlan] | None:
        """Schedule, and put the plans on the way to the groups."""
        plans = self.scheduler.schedule()
        if plans is None:
            assert self.in_flight or not self.scheduler.has_unfinished, "nothing is under way and nothing is planned"
        else:
            assert [plan.step for plan in plans] == [len(self.steps)] * len(self.ranks), "a group is left out"
            self.in_flight.append(plans)
            self.steps.append(plans)
        assert len(self.in_flight) == self.scheduler.num_in_flight <= self.config.max_in_flight
        self.check_books()
        return plans

    def receive(self) -> list[SequenceUpdate]:
        """Let the groups execute the oldest step only now, as slow ranks would, and apply their results."""
        plans = self.in_flight.popleft()
        results = [ranks.execute(plan) for ranks, plan in zip(self.ranks, plans, strict=True)]
        updates = self.scheduler.apply(results)
        for is_forced in (False, True):
            keys = [update.key for update in updates if bool(update.num_forced) is is_forced]
            assert len(set(keys)) == len(keys)
        for update in updates:
            self._take(update)
        self.check_books()
        return updates

    def step(self) -> list[StepPlan] | None:
        """One step there and back."""
        plans = self.send()
        if plans is not None:
            self.receive()
        return plans

    def run(self) -> None:
        """Until all is finished, with as many steps ahead as allowed."""
        for _ in range(MAX_STEPS):
            while self.send() is not None:
                pass
            if not self.in_flight:
                return
            self.receive()
        raise AssertionError(f"not finished after {MAX_STEPS} steps: {set(self.requests) - set(self.finish)}")

    def alone(self, key: Hashable) -> tuple[list[int], FinishReason]:
        """What the request gives when nothing else runs."""
        limit = self.scheduler.context_limit
        return generate_alone(self.requests[key], context_limit=limit, vocab_size=self.ranks[0].vocab_size)

    def check_books(self) -> None:
        """Nobody is lost between queue and groups, and the figures are the groups' summed."""
        stats = self.scheduler.stats
        unfinished = len(self.requests) - len(self.finish)
        assert self.scheduler.num_unfinished == stats.num_running + stats.num_waiting == unfinished
        assert stats.num_running <= self.config.max_num_seqs * len(self.ranks)
        assert stats.num_free_blocks == sum(pool.num_free for pool in self.pools)

    def _take(self, update: SequenceUpdate) -> None:
        key = update.key
        assert key not in self.finish, f"{key} got an update after its last"
        if update.admitted_cached_tokens is not None:
            assert key not in self.admissions, f"{key} was admitted twice"
            self.admissions.append(key)
        assert not update.token_ids or key in self.admissions, f"{key} got a token before it was admitted"
        self.token_ids[key] += update.token_ids
        self.logprobs[key] += update.logprobs
        if update.finish is not None:
            self.finish[key] = update.finish
