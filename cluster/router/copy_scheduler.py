"""Plans the steps of a whole copy: one scheduler per attention group, all in step, and who of them gets a request.

Hop 5. The groups have their own sequences, slots, KV and prefix caches, and meet in every layer with experts: so each
step has a plan for every group, an empty one for a group without work. Pure, like the schedulers below it.

Requests wait in one queue, by priority and arrival, and go to a group only when it can admit them in its next step. So
no group is idle while requests wait for another, and within a group nobody overtakes: the head of the queue is bound
to some group or nobody is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter

from msgspec.structs import replace

from cluster.errors import InvalidRequest, Overloaded
from cluster.router.blocks import BlockAllocator, chain_hashes, root_hash
from cluster.router.pace import PromptPace, StepLoad
from cluster.router.quarantine import Quarantine
from cluster.router.scheduler import Scheduler
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.scheduler_stats import SchedulerStats
from cluster.router.sequence import FinishReason, SequenceRequest, SequenceUpdate
from cluster.router.speculation import Move, next_move
from cluster.router.waiting import WaitingQueue
from workers.step import StepPlan, StepResult

LOAD_SLACK = 0.25
"""How much fuller than the emptiest a group may be for the sake of a prefix that it has in its cache."""


class CopyScheduler:
    """Owns the schedulers of one copy's attention groups. Their pools are of one size: a request fits all or none."""

    def __init__(self, config: SchedulerConfig, pools: Sequence[BlockAllocator]) -> None:
        self._config = config
        self._quarantine = Quarantine()
        self._groups = [_Group(index, config, blocks, self._quarantine) for index, blocks in enumerate(pools)]
        self._schedulers = [group.scheduler for group in self._groups]
        self._group_of: dict[Hashable, _Group] = {}
        self._queue: WaitingQueue[SequenceRequest] = WaitingQueue()
        self._num_added_total = 0
        self._pace = PromptPace(config.max_prefill_slowdown)

    @property
    def context_limit(self) -> int:
        """Longest prompt plus output that can run, in tokens."""
        return self._groups[0].scheduler.context_limit

    @property
    def num_groups(self) -> int:
        return len(self._groups)

    @property
    def pace(self) -> PromptPace:
        """How many prompt tokens a step takes beside decodes."""
        return self._pace

    @property
    def groups(self) -> list[Scheduler]:
        """The schedulers of the groups, in their order."""
        return self._schedulers

    @property
    def num_unfinished(self) -> int:
        return len(self._queue) + len(self._group_of)

    @property
    def most_unfinished(self) -> int:
        """Requests; one more is refused."""
        return self.num_groups * self._config.max_num_seqs + self._config.max_waiting

    @property
    def has_unfinished(self) -> bool:
        return self.num_unfinished > 0

    @property
    def num_in_flight(self) -> int:
        """Steps whose results are not back; the same in every group."""
        return self._groups[0].scheduler.num_in_flight

    @property
    def stats(self) -> SchedulerStats:
        """The groups' figures, summed; who has no group yet waits."""
        figures = zip(*[_figures(group.scheduler.stats) for group in self._groups], strict=True)
        summed = dict(zip(_STATS, map(sum, figures), strict=True))
        summed["num_waiting"] += len(self._queue)
        return SchedulerStats(**summed)

    def add(self, request: SequenceRequest) -> None:
        """Queue a request. Raises InvalidRequest, PromptTooLong or Overloaded; nothing has changed then."""
        if request.key in self._queue or request.key in self._group_of:
            raise InvalidRequest(f"key {request.key!r} belongs to an unfinished request; choose another", field="key")
        self._groups[0].scheduler.check(request)
        limit = self.most_unfinished
        if self.num_unfinished >= limit:
            stats = self.stats
            raise Overloaded(
                f"{stats.num_running} requests run and {stats.num_waiting} wait, the limit is {limit}; try again later"
            )
        self._queue.add(request.key, request, place=(-request.priority, self._num_added_total))
        self._num_added_total += 1

    def cancel(self, key: Hashable) -> SequenceUpdate | None:
        """End a sequence now: its blocks are free on return. Gives its last update, or None where it has ended."""
        if self._queue.remove(key) is not None:
            return SequenceUpdate(key, finish=FinishReason.CANCELLED)
        group = self._group_of.pop(key, None)
        return group.scheduler.cancel(key) if group is not None else None

    def set_budget(self, key: Hashable, thinking_budget: int) -> None:
        """Thinking tokens at most from now on, of a request that waits or runs; see `Scheduler.set_budget`."""
        if (request := self._queue.get(key)) is not None:
            self._queue.replace(key, dataclasses.replace(request, thinking_budget=thinking_budget))
        elif (group := self._group_of.get(key)) is not None:
            group.scheduler.set_budget(key, thinking_budget)

    def schedule(self) -> list[StepPlan] | None:
        """The next step: one plan per group, all of one number, at least one of them with a token to compute.

        None: nothing to send now, or enough plans are out.
        """
        if self.num_in_flight >= self._config.max_in_flight:
            return None
        move = next_move(self._config.speculation, self._schedulers)
        if move is Move.WAIT:
            return None
        self._assign()
        most_prompt_tokens = self.most_prompt_tokens()
        built = self._build(move, most_prompt_tokens)
        if most_prompt_tokens is not None and not any(built):
            built = self._build(move, None)  # those who decode wait for blocks: prompts hold up nobody
        if not any(built):
            return None
        plans = [
            scheduler.schedule_idle() if plan is None else plan
            for scheduler, plan in zip(self._schedulers, built, strict=True)
        ]
        self._pace.sent(_load(plans))
        if len(plans) == 1:
            return plans
        group_tokens = [plan.num_tokens for plan in plans]
        return [replace(plan, group_tokens=group_tokens) for plan in plans]

    def apply(self, results: Sequence[StepResult]) -> list[SequenceUpdate]:
        """Take each group's result of the oldest step in flight; see `Scheduler.apply`.

        Raises EngineError when a result is of another step or has not one token per sampling slot.
        """
        updates = [
            update
            for group, result in zip(self._groups, results, strict=True)
            for update in group.scheduler.apply(result)
        ]
        self._pace.took(max(result.compute_s for result in results))
        for update in updates:
            if update.finish is not None:
                del self._group_of[update.key]
        return updates

    def blame(self, *, is_suspicious: bool) -> list[SequenceUpdate]:
        """The ranks were lost. The ends of those who are given up for it; see `Quarantine`."""
        computing = [seq for group in self._groups for seq in group.scheduler.in_flight.computed]
        condemned = self._quarantine.blame(computing, is_suspicious=is_suspicious)
        return [self._group_of.pop(seq.request.key).scheduler.give_up(seq.request.key) for seq in condemned]

    def restart(self, pools: Sequence[BlockAllocator]) -> int:
        """The ranks are new; see `Scheduler.restart`."""
        self._pace.lost()
        return sum(group.restart(blocks) for group, blocks in zip(self._groups, pools, strict=True))

    def _build(self, move: Move, most_prompt_tokens: int | None) -> list[StepPlan | None]:
        is_drafting = move is Move.DRAFT
        return [
            scheduler.build(drafts=is_drafting, most_prompt_tokens=most_prompt_tokens) for scheduler in self._schedulers
        ]

    def most_prompt_tokens(self) -> int | None:
        """Of each group's next plan; None: all that its budget leaves."""
        if not self._pace.is_limiting:
            return None
        schedulers = self._schedulers
        num_waiting = self._num_held_up() + sum([scheduler.num_waiting for scheduler in schedulers])
        num_prefilling = sum([scheduler.num_prefilling for scheduler in schedulers])
        if not num_waiting and not num_prefilling:
            return None
        num_decoding = sum([scheduler.num_running for scheduler in schedulers]) - num_prefilling
        num_free_slots = self.num_groups * self._config.max_num_seqs - num_decoding - num_prefilling
        return self._pace.limit(num_decoding, num_prefilling + min(num_waiting, num_free_slots))

    def _num_held_up(self) -> int:
        """Of the queue, those that free blocks would hold if all were like its head, and as far as there are slots.

        They wait for the prompts before them: were these held back for the few who decode, all would stand in line.
        """
        if not self._queue:
            return 0
        blocks = [group.blocks for group in self._schedulers]
        num_wanted = blocks[0].num_blocks_for(len(self._queue.head.prompt_ids)) + 1
        return min(len(self._queue), sum([one.num_free // num_wanted for one in blocks]))

    def _assign(self) -> None:
        """Give the queue's head to a group as long as one can admit it now."""
        if not self._queue:
            return
        groups = self._groups
        for group in groups:
            group.count_backlog()
        while self._queue and (groups := [group for group in groups if group.has_room]):
            key, request = self._queue.pop()
            hashes = groups[0].hash_blocks(request)
            fit = _best_fit(groups, request, hashes)
            fit.group.take(request, hashes, fit.num_uncached)
            self._group_of[key] = fit.group


def _load(plans: Sequence[StepPlan]) -> StepLoad:
    """Of the step that these plans make."""
    num_prompt_tokens = max([sum([len(prefill.token_ids) for prefill in plan.prefills]) for plan in plans])
    return StepLoad(sum([len(plan.decodes) for plan in plans]), num_prompt_tokens)


_STATS = [field.name for field in fields(SchedulerStats)]
_figures = attrgetter(*_STATS)


class _Group:
    """One attention group, and how full it is."""

    def __init__(self, index: int, config: SchedulerConfig, blocks: BlockAllocator, quarantine: Quarantine) -> None:
        self.index = index
        self.scheduler = Scheduler(config, blocks, quarantine)
        self._config = config
        self._blocks = blocks
        self._num_backlog_tokens = 0

    @property
    def load(self) -> float:
        """The scarcer of slots and blocks, as the share that is taken."""
        slots = self.scheduler.num_unfinished / self._config.max_num_seqs
        return max(slots, 1 - self._blocks.num_free / self._blocks.num_blocks)

    @property
    def has_room(self) -> bool:
        """It has a slot for one more, and its next step has tokens left for it."""
        has_slot = self.scheduler.num_unfinished < self._config.max_num_seqs
        return has_slot and self._num_backlog_tokens < self._config.max_num_batched_tokens

    def restart(self, blocks: BlockAllocator) -> int:
        """See `Scheduler.restart`."""
        self._blocks = blocks
        return self.scheduler.restart(blocks)

    def count_backlog(self) -> None:
        """Note how many known tokens no plan has computed yet; `take` adds to it."""
        self._num_backlog_tokens = self.scheduler.num_backlog_tokens

    def hash_blocks(self, request: SequenceRequest) -> list[bytes]:
        """The names of the prompt's full blocks: the same in every group."""
        blocks = self._blocks
        if not blocks.enable_prefix_cache:
            return []
        return chain_hashes(root_hash(request.cache_salt), request.prompt_ids, blocks.block_size)

    def fit(self, request: SequenceRequest, hashes: list[bytes]) -> _Fit:
        blocks = self._blocks
        cached = blocks.match(hashes)
        num_prompt = len(request.prompt_ids)
        num_wanted = blocks.num_blocks_for(num_prompt) - len(cached) + blocks.num_idle(cached)
        num_kept = blocks.host.find(hashes[len(cached) :]) if blocks.host is not None else 0
        num_uncached = num_prompt - (len(cached) + num_kept) * blocks.block_size
        return _Fit(
            group=self,
            num_uncached=num_uncached,
            num_tokens_ahead=self._num_backlog_tokens + num_uncached,
            lacks_blocks=blocks.num_free < num_wanted + self.scheduler.num_unfinished,
        )

    def take(self, request: SequenceRequest, hashes: list[bytes], num_uncached: int) -> None:
        self._num_backlog_tokens += num_uncached
        self.scheduler.add(request, hashes)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    """How a request would find a group."""

    group: _Group
    num_uncached: int
    """Tokens of the prompt that neither the group's prefix cache has nor its hosts' memory."""
    num_tokens_ahead: int
    """Tokens to compute until its first token, those of others included."""
    lacks_blocks: bool

    @property
    def rank(self) -> tuple[bool, int, float, int]:
        """The least is the best: it can run at once, its first token comes soonest, the group is emptiest."""
        return (self.lacks_blocks, self.num_tokens_ahead, self.group.load, self.group.index)


def _best_fit(groups: Sequence[_Group], request: SequenceRequest, hashes: list[bytes]) -> _Fit:
    """The same for the same state, always."""
    highest_load = min(group.load for group in groups) + LOAD_SLACK
    fits = [group.fit(request, hashes) for group in groups if group.load <= highest_load]
    return min(fits, key=lambda fit: fit.rank)
