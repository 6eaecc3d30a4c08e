"""Decides what each step computes: continuous batching, chunked prefill, preemption, one plan ahead of the results.

Hops 5 and 10: requests in, plans out; results in, updates out. A state machine without clock, socket or await. Knows
nothing of ranks, gateways or what a token means, beyond the ids that end a thought or a sequence.

Order is priority; among equals who writes an answer goes before who thinks, since it is nearer its end; then the order
of arrival. Admission takes the head of the queue or nobody, and nobody is preempted for it. Where blocks run out, the
last in order goes back to its place in the queue. Nobody starves: the first in order can take the blocks of all others,
`context_limit` makes sure that the whole pool is enough for it, and a newcomer's phase gives it no better place.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable

from cluster.errors import InvalidRequest, Overloaded
from cluster.router.admission import Admission
from cluster.router.blocks import BlockAllocator
from cluster.router.fetches import add_fetches
from cluster.router.in_flight import StepsInFlight
from cluster.router.quarantine import Quarantine
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.scheduler_stats import SchedulerStats, Totals
from cluster.router.sequence import FinishReason, Phase, Sequence, SequenceRequest, SequenceUpdate
from cluster.router.slots import SlotTable
from cluster.router.speculation import Move, add_drafts, next_move
from cluster.router.step_builder import StepBuilder
from cluster.router.waiting import WaitingQueue
from workers.step import StepPlan, StepResult


class Scheduler:
    """Owns the sequences, slots and blocks of one attention group."""

    def __init__(self, config: SchedulerConfig, blocks: BlockAllocator, quarantine: Quarantine | None = None) -> None:
        """`quarantine`: of the whole copy, where this is one of its groups."""
        self._config = config
        self._blocks = blocks
        self._admission = Admission(config.max_model_len, blocks)
        self._quarantine = quarantine or Quarantine()
        self._sequences: dict[Hashable, Sequence] = {}
        self._waiting: WaitingQueue[Sequence] = WaitingQueue()
        self._num_added_total = 0
        self._slots = SlotTable(config.max_num_seqs, blocks)
        self._in_flight = StepsInFlight()
        self._next_step = 0
        self._totals = Totals()

    @property
    def context_limit(self) -> int:
        """Longest prompt plus output that can run, in tokens."""
        return self._admission.context_limit

    @property
    def sequences(self) -> Collection[Sequence]:
        """The unfinished sequences, to read."""
        return self._sequences.values()

    @property
    def running(self) -> Iterable[Sequence]:
        """Those with slots, to read; oldest admission first."""
        return self._slots.running

    @property
    def waiting(self) -> Iterable[Sequence]:
        """Those without, to read; in their order."""
        return self._waiting

    @property
    def blocks(self) -> BlockAllocator:
        return self._blocks

    @property
    def in_flight(self) -> StepsInFlight:
        """Plans whose results are not back, oldest first, to read."""
        return self._in_flight

    @property
    def num_running(self) -> int:
        return len(self._slots)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_preempted_total(self) -> int:
        return self._totals.preempted

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    @property
    def num_backlog_tokens(self) -> int:
        """Known tokens that no plan has computed yet: of those who wait, and of those who are still prefilling."""
        prefilling = sum(seq.prefill_end - seq.num_computed for seq in self._slots.running if seq.is_prefilling)
        return prefilling + sum(seq.num_known for seq in self._waiting)

    @property
    def num_prefilling(self) -> int:
        """Running sequences some of whose known tokens are in no plan yet."""
        return sum([seq.num_computed < seq.prefill_end for seq in self._slots.running])

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def stats(self) -> SchedulerStats:
        host = self._blocks.host
        num_thinking = sum(seq.phase is Phase.THINKING for seq in self._slots.running)
        return SchedulerStats(
            num_running=self.num_running,
            num_thinking=num_thinking,
            num_answering=self.num_running - num_thinking,
            num_waiting=self.num_waiting,
            num_blocks=self._blocks.num_blocks,
            num_free_blocks=self._blocks.num_free,
            num_cached_blocks=self._blocks.num_cached,
            num_host_blocks=0 if host is None else host.plan.num_blocks,
            num_used_host_blocks=0 if host is None else host.num_used,
            offloaded_tokens_total=self._totals.offloaded_blocks * self._blocks.block_size,
            fetched_tokens_total=self._totals.fetched_blocks * self._blocks.block_size,
            num_preempted_total=self._totals.preempted,
            prefix_query_tokens_total=self._totals.prefix_query_tokens,
            prefix_hit_tokens_total=self._totals.prefix_hit_tokens,
            draft_tokens_total=self._totals.draft_tokens,
            accepted_tokens_total=self._totals.accepted_tokens,
        )

    def add(self, request: SequenceRequest, block_hashes: Iterable[bytes] = ()) -> None:
        """Queue a request. Raises what `check` raises, or Overloaded; nothing has changed then.

        A prompt that leaves no room for output is refused. A `max_tokens` that the context or the KV pool cannot hold
        is not: the sequence ends with LENGTH at `context_limit`, since to ask for "as much as fits" is the common case.
        `block_hashes`: chain hashes of the first full blocks of its prompt, where the caller has them already.
        """
        self.check(request)
        self._check_room()
        seq = self._admission.start(request, self._num_added_total)
        self._num_added_total += 1
        seq.block_hashes += block_hashes
        self._sequences[request.key] = seq
        self._wait(seq)

    def check(self, request: SequenceRequest) -> None:
        """Raises InvalidRequest or PromptTooLong where the request can never run here."""
        if request.key in self._sequences:
            raise InvalidRequest(f"key {request.key!r} belongs to an unfinished request; choose another", field="key")
        self._admission.check(request)

    def cancel(self, key: Hashable) -> SequenceUpdate | None:
        """End a sequence now: its blocks are free on return. Gives its last update, or None where it has ended.

        The next plan that computes something closes its slot; until then ranks keep its table, which costs nothing.
        """
        seq = self._sequences.get(key)
        if seq is None:
            return None
        seq.finish = FinishReason.CANCELLED
        self._end(seq)
        return SequenceUpdate(key, finish=seq.finish)

    def set_budget(self, key: Hashable, thinking_budget: int) -> None:
        """Thinking tokens at most from now on; the thoughts are closed at once where there are as many already.

        Nothing happens to a sequence that has ended or closed its thoughts meanwhile.
        """
        seq = self._sequences.get(key)
        if seq is None:
            return
        seq.thinking_budget = thinking_budget
        if seq.is_over_budget:
            seq.close_thoughts()
            if seq.slot is None:
                self._wait_again(seq)

    def schedule(self) -> StepPlan | None:
        """The next plan, with at least one token to compute. None: nothing to send now, or enough plans are out."""
        match next_move(self._config.speculation, [self]):
            case Move.WAIT:
                return None
            case move:
                return self.build(drafts=move is Move.DRAFT)

    def build(self, *, drafts: bool, most_prompt_tokens: int | None = None) -> StepPlan | None:
        """The same where what is decided for all groups of a copy together is: whether this step has drafts, and how
        many prompt tokens it may have; None: all that its budget leaves.
        """
        if len(self._in_flight) >= self._config.max_in_flight:
            return None
        budget = self._config.max_num_batched_tokens
        step = StepBuilder(budget, budget if most_prompt_tokens is None else most_prompt_tokens)
        for seq in self._add_decodes(step):
            if step.can_prefill:
                step.prefill(seq)
        self._add_admissions(step)
        if self._blocks.host is not None:
            add_fetches(step, self._slots, self._blocks.host, self._reopen)
        if drafts:
            speculation = self._config.speculation
            self._totals.draft_tokens += add_drafts(step, speculation, self.num_running, self._blocks.block_size)
        if step.is_empty:
            return None
        return self._send(step, self._slots.take_closed())

    def schedule_idle(self) -> StepPlan:
        """A plan that computes nothing, so that this scheduler's numbers go on as those of others that do compute."""
        return self._send(StepBuilder(budget=0, prompt_budget=0), close=[])

    def apply(self, result: StepResult) -> list[SequenceUpdate]:
        """Take the group's result of the oldest plan in flight.

        At most two updates per sequence: one with forced tokens, and one with the token that was sampled after them.
        Raises EngineError when the result is of another step or has not one token per sampling slot.
        """
        done = self._in_flight.take(result)
        admitted = [seq for seq, _ in done.admitted if not seq.has_ended]
        for seq, cached_tokens in done.admitted:
            seq.unannounced_cached_tokens = cached_tokens
        more = dict(zip(done.drafted, result.accepted_ids, strict=True))
        self._totals.accepted_tokens += sum(map(len, more.values()))
        for prefill, seq, start in done.scored:
            seq.take_scores(start, result.prompt_logprobs[prefill])
        updates: list[SequenceUpdate] = []
        for index, (seq, token_id) in enumerate(zip(done.sampled, result.token_ids, strict=True)):
            if seq.has_ended:
                continue  # it ended while this step was under way: the token is one too many
            if seq.num_stale:
                seq.num_stale -= 1
                continue  # another one was forced in its place
            seq.num_pending -= 1
            if (forced := seq.take_forced()) is not None:
                updates.append(forced)
            if not seq.has_ended:
                logprobs = (result.logprobs[index],) if index in result.logprobs else ()
                updates.append(seq.take_sampled([token_id, *more.get(seq, ())], logprobs))
            if seq.has_ended:
                self._end(seq)
            elif seq.slot is None:
                self._wait_again(seq)
        announcements = (seq.take_announcement() for seq in admitted)
        return updates + [update for update in announcements if update is not None]

    def restart(self, blocks: BlockAllocator) -> int:
        """The ranks are new, with nothing computed and these blocks: everyone who ran waits in its place again.

        Returns how many tokens must be put through the model again. Plans that were under way have no results any more.
        """
        for seq, cached_tokens in self._in_flight.admitted:
            seq.unannounced_cached_tokens = cached_tokens
        self._in_flight.clear()
        running = list(self._slots.running)
        num_lost_tokens = sum(min(seq.num_computed, seq.num_known) for seq in running)
        self._slots = SlotTable(self._config.max_num_seqs, blocks)
        self._blocks = blocks
        self._admission = Admission(self._config.max_model_len, blocks)
        for seq in self._sequences.values():
            seq.lose_ranks()
        for seq in running:
            self._wait(seq)
        return num_lost_tokens

    def passed(self, num_steps: int) -> None:
        """See `StepsInFlight.passed`."""
        self._next_step += num_steps
        self._in_flight.passed(num_steps, list(self._slots.running))

    def give_up(self, key: Hashable) -> SequenceUpdate:
        """End a sequence that ranks cannot compute."""
        seq = self._sequences[key]
        seq.finish = FinishReason.GIVEN_UP
        self._end(seq)
        return SequenceUpdate(key, finish=seq.finish)

    def _check_room(self) -> None:
        limit = self._config.max_num_seqs + self._config.max_waiting
        if len(self._sequences) >= limit:
            raise Overloaded(
                f"{self.num_running} requests run and {self.num_waiting} wait, the limit is {limit}; try again later"
            )

    def _add_decodes(self, step: StepBuilder) -> list[Sequence]:
        """A decode for everyone who can have one. Returns those who are still prefilling. Both in order."""
        prefilling = []
        for seq in self._slots.ranked:
            if seq.slot is None:
                continue  # preempted for an earlier one in this very loop
            if seq.fetches:
                continue  # its blocks are brought back first
            # Only where it is prefilled, too: a step that computes nothing is not sent, and would tell nobody.
            if seq.must_reopen and not (step.can_prefill and self._reopen(seq, step)):
                continue
            if seq.num_computed < seq.prefill_end:
                prefilling.append(seq)
            elif len(seq.output_ids) + seq.num_pending < seq.max_output and self._make_room(seq, step):
                step.decode(seq)
        return prefilling

    def _make_room(self, seq: Sequence, step: StepBuilder) -> bool:
        """A block for the next position of `seq`, if need be at the cost of later sequences.

        False: it is the last itself. It then keeps what it has and waits for earlier ones, who may still preempt it.
        """
        if seq.num_computed < len(seq.block_ids) * self._blocks.block_size:
            return True
        if not self._free(1, seq):
            return False
        step.extend(seq, self._blocks.allocate(1))
        return True

    def _reopen(self, seq: Sequence, step: StepBuilder) -> bool:
        """Tell the ranks of the tokens that were forced, with blocks for them; False: as for `_make_room`."""
        num_missing = max(0, self._blocks.num_blocks_for(seq.num_known) - len(seq.block_ids))
        if not self._free(num_missing, seq):
            return False
        step.reopen(seq, self._blocks.allocate(num_missing))
        return True

    def _free(self, num_blocks: int, seq: Sequence) -> bool:
        """Have so many blocks free, if need be at the cost of sequences after `seq`; False: those are not enough."""
        while self._blocks.num_free < num_blocks:
            # Victims come after `seq` in this step's order, so none of them is in the step yet.
            victim = self._slots.last
            if victim is seq:
                return False
            self._preempt(victim)
        return True

    def _add_admissions(self, step: StepBuilder) -> None:
        """Slots for those who wait, in order. Nobody overtakes a head that does not fit yet."""
        while self._waiting and self._slots.has_free_slot and step.can_prefill:
            seq = self._waiting.first(self._quarantine.may_run)
            # A preempted sequence whose last token is still being sampled comes back when that token is known.
            if seq is None or seq.num_pending or not self._slots.try_enter(seq):
                return
            self._waiting.remove(seq.request.key)
            self._quarantine.runs(seq)
            if not seq.was_admitted:
                self._count_first_admission(seq, step)
            if not seq.fetches:
                step.prefill(seq)

    def _count_first_admission(self, seq: Sequence, step: StepBuilder) -> None:
        seq.was_admitted = True
        step.admitted.append((seq, seq.num_computed))
        if self._blocks.enable_prefix_cache and not seq.needs_scores:
            self._totals.prefix_query_tokens += len(seq.request.prompt_ids)
            self._totals.prefix_hit_tokens += seq.num_computed

    def _send(self, step: StepBuilder, close: list[int]) -> StepPlan:
        """Number the step and remember it until its result is back."""
        for seq in step.prefilled:
            self._slots.publish_prompt(seq)
        number = self._next_step
        self._next_step += 1
        self._in_flight.add(step.in_flight(number))
        host = self._blocks.host
        if host is None:
            return step.plan(number, close, [])
        host.let_go(host_id for host_id, _ in step.fetched)
        offloads = host.take_offloads()
        self._totals.offloaded_blocks += len(offloads)
        self._totals.fetched_blocks += len(step.fetched)
        return step.plan(number, close, offloads)

    def _preempt(self, seq: Sequence) -> None:
        """Back to its place in the queue. Its tokens are all that is kept; they are prefilled again later."""
        self._slots.publish_known(seq)
        self._slots.leave(seq)
        self._wait(seq)
        seq.num_preemptions += 1
        self._totals.preempted += 1

    def _wait(self, seq: Sequence) -> None:
        is_near_end = seq.was_admitted and seq.phase is Phase.ANSWER
        self._waiting.add(seq.request.key, seq, place=(-seq.request.priority, not is_near_end, seq.arrival))

    def _wait_again(self, seq: Sequence) -> None:
        """Its phase may have changed, and with it its place."""
        self._waiting.remove(seq.request.key)
        self._wait(seq)

    def _end(self, seq: Sequence) -> None:
        """It has finished: drop it wherever it is."""
        del self._sequences[seq.request.key]
        self._slots.forget_output(seq)
        if seq.slot is None:
            self._waiting.remove(seq.request.key)
        else:
            self._slots.leave(seq)
