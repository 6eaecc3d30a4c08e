"""One copy of the model in virtual time: the production engine core and schedulers, with a cost model for ranks.

The Router's loop as it is in the product: the next plan is sent before the last result is back, ranks run plans in
order, results are applied as they come. Where the next steps are foreseen (`fast_forward`), they are taken together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable

from cluster.errors import Overloaded, RankLossCause, RankLost
from cluster.gateway.affinity import CopyLoad
from cluster.planner.ahead import Ahead, Sent, group_shape, look_ahead
from cluster.planner.cost import CostModel
from cluster.planner.fast_forward import (
    Told,
    apply_plain,
    contexts,
    end_those_who_are_full,
    foresee,
    give_blocks,
    is_plain,
    pass_time,
    skip,
)
from cluster.planner.fillers import FILLER_ID, THINK_END_ID, filler_request
from cluster.planner.flights import Flight, Work
from cluster.router.copy_scheduler import CopyScheduler
from cluster.router.engine_core import YOUNG_STEPS, EngineCore, Pool
from cluster.router.scheduler import Scheduler
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.supervision import RestartPolicy
from workers.step import StepResult

_WORTH_SKIPPING = 2
"""Steps: one is decided as fast."""


class SimCopy:
    """`advance` it whenever the clock reaches `next_s`; `on_end` gets each flight that is over."""

    def __init__(
        self,
        number: int,
        cost: CostModel,
        config: SchedulerConfig,
        pool: Pool,
        *,
        on_end: Callable[[Flight], object],
        shared_prompt_tokens: int = 0,
        may_skip: bool = True,
    ) -> None:
        """`shared_prompt_tokens`: how many tokens all prompts begin with; `may_skip`: take foreseen steps together."""
        self.name = f"copy-{number}"
        self.work = Work()
        self.next_s: float | None = None
        """When something happens by itself; None: nothing does before a request comes."""
        self.flights: dict[Hashable, Flight] = {}
        self.is_open = True
        """It takes new requests."""
        self.is_leaving = False
        """It drains, and is not opened again."""
        self.silent_since_s: float | None = None
        """A rank answers no longer, and nobody has noticed; None: all do."""
        self.number = number
        self._cost, self._config, self._pool = cost, config, pool
        self._on_end = on_end
        self._shared = shared_prompt_tokens
        self._may_skip = may_skip
        self._core = EngineCore(config, RestartPolicy(), enable_prefix_cache=shared_prompt_tokens > 0)
        self._core.on_started(pool)
        assert self._core.scheduler is not None, "it has been started"
        self.scheduler: CopyScheduler = self._core.scheduler
        self._num_blocks = pool.num_groups * pool.num_blocks
        self._sent: deque[Sent] = deque()
        self._ahead: Ahead | None = None
        self._started_s = 0.0
        """When the oldest plan under way began to run."""
        self._num_steps_of_life = 0
        """Of the present ranks."""
        self._is_held = False
        """The newest plan might have had prompts, but for the pace."""
        self._has_new = False
        """Requests came since the last plan."""
        self._thinking_tokens: dict[Hashable, int] = {}
        """Of its flights."""
        self._paused: set[Hashable] = set()
        """Flights that stand still, and go on with their next token."""

    @property
    def num_running(self) -> int:
        groups = self.scheduler.groups
        return groups[0].num_running if len(groups) == 1 else sum([group.num_running for group in groups])

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_unfinished - self.num_running

    @property
    def load(self) -> CopyLoad:
        """What it says of itself."""
        return CopyLoad(num_running=self.num_running, num_waiting=self.num_waiting)

    @property
    def kv_share(self) -> float:
        """Of its blocks, those in use."""
        return 1 - sum([group.blocks.num_free for group in self.scheduler.groups]) / self._num_blocks

    def tokens_by(self, now_s: float) -> tuple[int, int]:
        """Output tokens and steps until now, those that are foreseen and not yet written included."""
        tokens, steps = self.work.decode_tokens, self.work.num_steps
        if self._ahead is not None:
            num_steps = self._ahead.done_by(now_s)
            begun = [one.num_sampled for one, _ in zip(self._sent, range(num_steps), strict=False)]
            tokens += sum(begun) + (num_steps - len(begun)) * self._ahead.decode.num_sampled
            steps += num_steps
        return tokens, steps

    def add(self, flight: Flight, now_s: float, output_ids: list[int] | None = None) -> None:
        """A request comes, maybe with output from elsewhere. Raises what `EngineCore.add` raises."""
        if self._ahead is not None and self.scheduler.num_unfinished >= self.scheduler.most_unfinished:
            # Who waits would be let in by an end, which is not foreseen: it is as full as it was.
            raise Overloaded(f"{self.name} has {self.scheduler.num_unfinished} requests, as many as it takes")
        self._settle(now_s)
        try:
            self._queue(flight, output_ids or [])
            if not self._sent:
                self._send(now_s)
        finally:
            self._look_ahead()  # what runs goes on where this one is refused

    def add_together(self, flights: Iterable[Flight], now_s: float) -> None:
        """Requests that are there before the next plan is made, on a copy that has nothing else."""
        assert not self._sent, f"{self.name} is not idle"
        for flight in flights:
            self._queue(flight, [])
        self._send(now_s)
        self._look_ahead()

    def _queue(self, flight: Flight, output_ids: list[int]) -> None:
        self._core.add(filler_request(flight, output_ids, self._shared))
        self.flights[flight.key] = flight
        self._thinking_tokens[flight.key] = flight.arrival.thinking_tokens
        flight.copy = self.name
        if flight.paused_s is not None:
            self._paused.add(flight.key)
        if output_ids:
            self.work.recomputed_tokens += flight.arrival.prompt_tokens + len(output_ids)
        self._has_new = True

    def advance(self) -> None:
        """What happens at `next_s`."""
        assert self.next_s is not None, "nothing is under way"
        now_s = self.next_s
        self._settle(now_s)
        if self._sent and self._oldest_ends_s <= now_s:
            self._take_result(now_s)
        self._look_ahead()

    def catch_up(self, now_s: float) -> None:
        """Write what has happened until now, so that figures are of now."""
        self._settle(now_s)
        self._look_ahead()

    def fall_silent(self, now_s: float) -> None:
        """A rank answers no longer: its Router waits for a result, and takes requests. Follow with `lose_ranks`."""
        self._settle(now_s)
        self.silent_since_s = now_s
        self._pause(now_s)
        self._look_ahead()

    def lose_ranks(self, now_s: float) -> None:
        """A rank is killed: plans under way have no results. Follow with `start_ranks`."""
        self._settle(now_s)
        self.silent_since_s = None
        loss = self._core.on_lost(RankLost("a rank was lost", rank=0, was_killed=True, cause=RankLossCause.EXITED))
        self._sent.clear()
        self._ahead, self.next_s, self.is_open = None, None, False
        self._pause(now_s)
        for update in loss.given_up:
            self._end(update.key, now_s)

    def _pause(self, now_s: float) -> None:
        """All its streams stand still."""
        for flight in self.flights.values():
            flight.pause(now_s)
            if flight.paused_s is not None:
                self._paused.add(flight.key)

    def start_ranks(self, now_s: float) -> None:
        """They are back, empty."""
        before = self._core.num_replayed_tokens_total
        self._core.on_started(self._pool)
        self.work.recomputed_tokens += self._core.num_replayed_tokens_total - before
        self._num_steps_of_life = 0
        self.is_open = not self.is_leaving
        self._started_s = now_s
        self._send(now_s)
        self._look_ahead()

    def give_back(self, now_s: float) -> list[tuple[Flight, list[int]]]:
        """All flights leave it, with their output so far: it drains no longer, or is lost."""
        self._settle(now_s)
        outputs = {seq.request.key: seq.output_ids for group in self.scheduler.groups for seq in group.sequences}
        leaving = [(flight, outputs.get(key, [])) for key, flight in self.flights.items()]
        for key in list(self.flights):
            self._core.cancel(key)
        self.flights.clear()
        self._thinking_tokens.clear()
        self._paused.clear()
        return leaving

    @property
    def _oldest_ends_s(self) -> float:
        return self._started_s + self._sent[0].total_s

    def _send(self, now_s: float) -> None:
        """As many plans as may be under way."""
        if not self._sent:
            self._started_s = now_s
        while len(self._sent) < self._config.max_in_flight:
            is_held = self._holds_prompts()
            if (plans := self._core.next_plans()) is None:
                break
            self._is_held = is_held
            groups = self.scheduler.groups
            shape = [group_shape(plan, group) for plan, group in zip(plans, groups, strict=True)]
            num_sampled = sum(len(group.in_flight.newest.sampled) for group in groups)
            self._sent.append(Sent.of(shape, self._cost.step(shape), num_sampled))
            self.work.num_decided_steps += 1
            self._has_new = False

    def _holds_prompts(self) -> bool:
        """The next plan has none for as long as the pace must see what steps take without them."""
        pace = self.scheduler.pace
        if not pace.is_limiting:
            return False
        num_running = self.num_running
        return self.scheduler.num_unfinished > num_running and pace.must_look(num_running)

    def _take_result(self, now_s: float) -> None:
        sent = self._sent.popleft()
        results = [self._result(group, sent.total_s, now_s) for group in self.scheduler.groups]
        self._count(sent)
        self._started_s = now_s
        self._apply(results, now_s)
        self._send(now_s)

    def _apply(self, results: list[StepResult], now_s: float) -> None:
        self._num_steps_of_life += 1
        groups = self.scheduler.groups
        is_bulk = self._may_skip and self._num_steps_of_life > YOUNG_STEPS
        if is_bulk and all(map(is_plain, groups)):
            self.scheduler.pace.took(results[0].compute_s)
            for group, result in zip(groups, results, strict=True):
                apply_plain(group, result)
            return
        for update in self._core.on_results(results):
            if update.finish is not None:
                self._end(update.key, now_s)

    def _result(self, group: Scheduler, step_s: float, now_s: float) -> StepResult:
        """What its rank says: fillers, and the closing tag where thoughts end."""
        oldest = group.in_flight.oldest
        token_ids = []
        flights = self.flights
        for seq in oldest.sampled:
            token_id = FILLER_ID
            flight = flights.get(seq.request.key)
            if flight is not None:  # else it has ended: nobody gets this one
                num_before = len(seq.output_ids)
                num_thinking = flight.arrival.thinking_tokens
                if num_before == num_thinking - 1:
                    token_id = THINK_END_ID
                if not num_before:
                    flight.first_token_s = now_s
                if self._paused:
                    self._go_on(flight, now_s)
                if num_before == num_thinking:
                    flight.first_answer_s = now_s
            token_ids.append(token_id)
        return StepResult(oldest.step, 0, token_ids, compute_s=step_s)

    def _go_on(self, flight: Flight, now_s: float) -> None:
        self._paused.discard(flight.key)
        flight.go_on(now_s)

    def _end(self, key: Hashable, now_s: float) -> None:
        flight = self.flights.pop(key)
        del self._thinking_tokens[key]
        self._paused.discard(key)
        flight.end_s = now_s
        self._on_end(flight)

    def _count(self, sent: Sent) -> None:
        work = self.work
        work.take(sent.time, sent.total_s, 1, self.kv_share)
        work.decode_tokens += sent.num_sampled
        work.prefill_tokens += sent.prefill_tokens
        work.gaps.add(sent.total_s, sent.load.num_decodes)

    # Steps that are foreseen

    def _look_ahead(self) -> None:
        """Find out when something happens next, and whether it is known until then."""
        self._ahead = None
        if not self._sent or self.silent_since_s is not None:
            self.next_s = None
            return
        ahead = self._foresee()
        if ahead is None or ahead.num_steps < _WORTH_SKIPPING:
            self.next_s = self._oldest_ends_s
        else:
            self._ahead, self.next_s = ahead, ahead.behind(ahead.num_steps)

    def _foresee(self) -> Ahead | None:
        if not self._may_skip or self._is_held:
            return None
        scheduler, sent = self.scheduler, self._sent
        if scheduler.num_unfinished > self.num_running:
            if self._has_new and any(one.num_unfinished < self._config.max_num_seqs for one in scheduler.groups):
                return None
            if not all(one.is_decode for one in sent):
                return None  # what is learnt of prompts' time may let another one in, and a budget may have been full
        foreseen = foresee(scheduler)
        if foreseen is None:
            return None
        return look_ahead(self._started_s, sent, foreseen.num_steps, foreseen.next_shape, self._cost)

    def _settle(self, now_s: float) -> None:
        """Write what was foreseen until now."""
        ahead, self._ahead = self._ahead, None
        num_steps = ahead.done_by(now_s) if ahead is not None else 0
        if ahead is None or not num_steps:
            return
        scheduler, sent = self.scheduler, self._sent
        kv_before = self.kv_share
        skipped = skip(scheduler, num_steps, self._thinking_tokens, self._paused)
        self._tell(ahead, skipped.told)
        pass_time(scheduler, ahead, sent, num_steps)
        depth = len(sent)
        num_old = min(num_steps, depth)
        for _ in range(num_old):
            self._count(sent.popleft())
        if num_steps > num_old:
            self._count_many(ahead, num_steps - num_old, (kv_before + self.kv_share) / 2)
        sent.extend(ahead.plan(number) for number in range(num_steps - num_old, num_steps))
        self._num_steps_of_life += num_steps
        self._started_s = ahead.behind(num_steps)
        ends = end_those_who_are_full(scheduler)
        for key in ends.keys:
            self._end(key, self._started_s)
        if ends.has_changed:
            self._mend(depth - num_old)
        give_blocks(skipped.lacking)

    def _tell(self, ahead: Ahead, told: Iterable[Told]) -> None:
        """Flights know of their results."""
        for one in told:
            flight = self.flights[one.key]
            if one.token is not None:
                if flight.first_token_s is None:
                    flight.first_token_s = ahead.behind(one.token)
                self._go_on(flight, ahead.behind(one.token))
            if one.answer is not None:
                flight.first_answer_s = ahead.behind(one.answer)

    def _count_many(self, ahead: Ahead, num_steps: int, kv_share: float) -> None:
        """Of those behind the ones that were under way; `kv_share`: on average."""
        work, num_sampled = self.work, ahead.decode.num_sampled
        total_s = num_steps * ahead.decode.total_s + ahead.growth_s * num_steps * (num_steps - 1) / 2
        work.take(ahead.plan(num_steps // 2).time, total_s, num_steps, kv_share)
        work.decode_tokens += num_steps * num_sampled
        work.gaps.add(total_s / num_steps, num_steps * num_sampled)

    def _mend(self, first: int) -> None:
        """Plans that were foreseen, from that one under way on, are without those who have ended."""
        sent, groups = self._sent, self.scheduler.groups
        while len(sent) > self.scheduler.num_in_flight:
            sent.pop()
        for place, plans in enumerate(zip(*map(contexts, groups), strict=True)):
            if place >= first:
                shape = list(plans)
                sent[place] = Sent.of(shape, self._cost.step(shape), sum(group.num_decodes for group in shape))
        self.scheduler.pace.are_under_way([one.load for one in sent])
