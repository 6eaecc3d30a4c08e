"""A copy without a model: the real scheduler over `FakeRanks`, and what its clients have got so far."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from cluster.router.blocks import BlockAllocator
from cluster.router.scheduler import Scheduler, SchedulerConfig
from cluster.router.sequence import FinishReason, Phase, SequenceRequest, SequenceUpdate
from tests.fakes import FakeRanks, generate_alone, next_token
from workers.step import SamplingParams, StepPlan, TokenLogprobs

MAX_STEPS = 100_000
PROMPT = list(range(10, 19))
"""9 tokens: two full blocks of 4, and one token."""


def request(key: Hashable, prompt_ids: list[int], *, max_tokens: int = 4, **more: Any) -> SequenceRequest:
    """A request that stops at nothing unless told so."""
    more.setdefault("sampling", SamplingParams(seed=7))
    return SequenceRequest(key=key, prompt_ids=prompt_ids, max_tokens=max_tokens, **more)


def first_token(prompt_ids: list[int]) -> int:
    """What the fake ranks sample after this prompt for `request`."""
    return next_token(prompt_ids, 7, 50)


class FakeCopy:
    """Drives plans and results, and checks the books after every move."""

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
    ) -> None:
        self.blocks = BlockAllocator(num_blocks, block_size, enable_prefix_cache)
        self.config = SchedulerConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_waiting=max_waiting,
            max_in_flight=max_in_flight,
        )
        self.scheduler = Scheduler(self.config, self.blocks)
        self.vocab_size = vocab_size
        self.ranks = self._new_ranks()
        self.in_flight: deque[StepPlan] = deque()
        self.plans: list[StepPlan] = []
        self.requests: dict[Hashable, SequenceRequest] = {}
        self.token_ids: dict[Hashable, list[int]] = {}
        self.logprobs: dict[Hashable, list[TokenLogprobs]] = {}
        self.cached_tokens: dict[Hashable, int] = {}
        self.finish: dict[Hashable, FinishReason] = {}
        self.forced: dict[Hashable, list[int]] = {}
        self.prompt_logprobs: dict[Hashable, list[TokenLogprobs]] = {}

    def _new_ranks(self) -> FakeRanks:
        return FakeRanks(
            num_blocks=self.blocks.num_blocks,
            block_size=self.blocks.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            vocab_size=self.vocab_size,
        )

    def lose_ranks(self) -> None:
        """Others take their place, with nothing computed; the plans under way have no results."""
        blocks = self.blocks
        self.blocks = BlockAllocator(blocks.num_blocks, blocks.block_size, blocks.enable_prefix_cache)
        self.ranks = self._new_ranks()
        self.in_flight.clear()
        self.scheduler.restart(self.blocks)
        self.check_books()

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

    def set_budget(self, key: Hashable, thinking_budget: int) -> None:
        """Lower or raise a budget; what is known by then cannot be taken back, so that `alone` must yield it, too."""
        thinking = [seq for seq in self.scheduler.sequences if seq.request.key == key and seq.phase is Phase.THINKING]
        for seq in thinking:
            effective = max(thinking_budget, seq.num_thinking)
            self.requests[key] = replace(self.requests[key], thinking_budget=effective)
        self.scheduler.set_budget(key, thinking_budget)
        self.check_books()

    def send(self) -> StepPlan | None:
        """Schedule, and put the plan on the way to the ranks."""
        plan = self.scheduler.schedule()
        if plan is None:
            assert self.in_flight or not self.scheduler.has_unfinished, "nothing is under way and nothing is planned"
        else:
            self.in_flight.append(plan)
            self.plans.append(plan)
        assert len(self.in_flight) == self.scheduler.num_in_flight <= self.config.max_in_flight
        self.check_books()
        return plan

    def receive(self) -> list[SequenceUpdate]:
        """Let the ranks execute the oldest plan only now, as slow ranks would, and apply its result."""
        updates = self.scheduler.apply(self.ranks.execute(self.in_flight.popleft()))
        for is_forced in (False, True):
            keys = [update.key for update in updates if bool(update.num_forced) is is_forced]
            assert len(set(keys)) == len(keys)
        for update in updates:
            self._take(update)
        self.check_books()
        return updates

    def step(self) -> StepPlan | None:
        """One plan there and back."""
        plan = self.send()
        if plan is not None:
            self.receive()
        return plan

    def run(self) -> None:
        """Until all is finished, with as many plans ahead as allowed."""
        for _ in range(MAX_STEPS):
            while self.send() is not None:
                pass
            if not self.in_flight:
                return
            self.receive()
        raise AssertionError(f"not finished after {MAX_STEPS} steps: {list(self.scheduler.sequences)}")

    def alone(self, key: Hashable) -> tuple[list[int], FinishReason]:
        """What the request gives when nothing else runs."""
        limit = self.scheduler.context_limit
        return generate_alone(self.requests[key], context_limit=limit, vocab_size=self.ranks.vocab_size)

    def check_books(self) -> None:
        """Blocks are counted once per owner; arrival order of equals is admission order; limits hold."""
        sequences = list(self.scheduler.sequences)
        owners = Counter(block_id for seq in sequences for block_id in seq.block_ids)
        users = [self.blocks.num_users(block_id) for block_id in range(self.blocks.num_blocks)]
        assert users == [owners[block_id] for block_id in range(self.blocks.num_blocks)]
        assert self.blocks.num_free == users.count(0)
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

    def _take(self, update: SequenceUpdate) -> None:
        key = update.key
        assert key not in self.finish, f"{key} got an update after its last"
        if update.admitted_cached_tokens is not None:
            assert key not in self.cached_tokens, f"{key} was admitted twice"
            self.cached_tokens[key] = update.admitted_cached_tokens
        assert not update.token_ids or key in self.cached_tokens, f"{key} got a token before it was admitted"
        self.token_ids[key] += update.token_ids
        self.logprobs[key] += update.logprobs
        if update.prompt_logprobs:
            assert update.admitted_cached_tokens == 0, "a prompt that was scored was found in the cache, or came late"
            self.prompt_logprobs[key] = update.prompt_logprobs
        if update.num_forced:
            assert update.num_forced == len(update.token_ids)
            assert key not in self.forced, f"the thoughts of {key} were closed twice"
            self.forced[key] = update.token_ids
        if update.finish is not None:
            self.finish[key] = update.finish
