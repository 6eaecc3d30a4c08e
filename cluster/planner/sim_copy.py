"""One copy of the model in virtual time: the production engine core and schedulers, with a cost model for ranks.

The Router's loop as it is in the product: the next plan is sent before the last result is back, ranks run plans in
order, results are applied as they come. Where the next steps are foreseen (`fast_forward`), they are taken together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from cluster.errors import RankLossCause, RankLost
from cluster.gateway.affinity import CopyLoad
from cluster.planner.cost import CostModel
from cluster.planner.fast_forward import (
    FILLER_ID,
    THINK_END_ID,
    apply_plain,
    contexts,
    end_those_who_are_full,
    foresee,
    is_plain,
    pass_time,
    skip,
)
from cluster.planner.flights import Flight, Work
from cluster.planner.roofline import StepTime
from cluster.planner.step_shape import GroupShape, StepShape, chunk_pairs
from cluster.router.copy_scheduler import CopyScheduler
from cluster.router.engine_core import YOUNG_STEPS, EngineCore, Pool
from cluster.router.scheduler import Scheduler
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import SequenceRequest
from cluster.router.supervision import RestartPolicy
from workers.step import SamplingParams, StepPlan, StepResult

_GREEDY = SamplingParams(temperature=0.0)
_WORTH_SKIPPING = 3
"""Steps: fewer are decided one by one as fast."""


@dataclass(frozen=True, slots=True)
class _Sent:
    """A plan on its way."""

    shape: StepShape
    time: StepTime
    is_decode: bool
    """Nothing else."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Decode steps that are foreseen: step i lasts first_s + i * growth_s."""

    start_s: float
    num_steps: int
    first_s: float
    growth_s: float

    def behind(self, num_steps: int) -> float:
        """When so many results are there."""
        return self.start_s + num_steps * self.first_s + self.growth_s * num_steps * (num_steps - 1) / 2

    def done_by(self, time_s: float) -> int:
        """Results that are there at a time."""
        lowest, highest = 0, self.num_steps
        while lowest < highest:
            middle = (lowest + highest + 1) // 2
            lowest, highest = (middle, highest) if self.behind(middle) <= time_s else (lowest, middle - 1)
        return lowest


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
        self.number = number
        self._cost, self._config, self._pool = cost, config, pool
        self._on_end = on_end
        self._shared = shared_prompt_tokens
        self._may_skip = may_skip
        self._core = EngineCore(config, RestartPolicy(), enable_prefix_cache=shared_prompt_tokens > 0)
        self._core.on_started(pool)
        self._sent: deque[_Sent] = deque()
        self._ahead: _Ahead | None = None
        self._started_s = 0.0
        """When the oldest plan under way began to run."""
        self._num_steps_of_life = 0
        """Of the present ranks."""
        self._is_held = False
        """The newest plan might have had prompts, but for the pace."""
        self._has_new = False
        """Requests came since the last plan."""

    @property
    def scheduler(self) -> CopyScheduler:
        scheduler = self._core.scheduler
        assert scheduler is not None, "it has been started, and is never closed"
        return scheduler

    @property
    def num_running(self) -> int:
        return sum(group.num_running for group in self.scheduler.groups)

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
        blocks = [group.blocks for group in self.scheduler.groups]
        return 1 - sum(pool.num_free for pool in blocks) / sum(pool.num_blocks for pool in blocks)

    def tokens_by(self, now_s: float) -> tuple[int, int]:
        """Output tokens and steps until now, those that are foreseen and not yet written included."""
        num_steps = self._ahead.done_by(now_s) if self._ahead is not None else 0
        each = sum(group.num_decodes for group in self._sent[0].shape) if num_steps else 0
        return self.work.decode_tokens + num_steps * each, self.work.num_steps + num_steps

    def add(self, flight: Flight, now_s: float, output_ids: list[int] | None = None) -> None:
        """A request comes, maybe with output from elsewhere. Raises what `EngineCore.add` raises."""
        self._settle(now_s)
        self._queue(flight, output_ids or [])
        if not self._sent:
            self._send(now_s)
        self._look_ahead()

    def add_together(self, flights: Iterable[Flight], now_s: float) -> None:
        """Requests that are there before the next plan is made."""
        self._settle(now_s)
        for flight in flights:
            self._queue(flight, [])
        if not self._sent:
            self._send(now_s)
        self._look_ahead()

    def _queue(self, flight: Flight, output_ids: list[int]) -> None:
        self._core.add(self._request(flight, output_ids))
        self.flights[flight.key] = flight
        flight.copy = self.name
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

    def lose_ranks(self, now_s: float) -> None:
        """A rank is killed: plans under way have no results. Follow with `start_ranks`."""
        self._settle(now_s)
        loss = self._core.on_lost(RankLost("a rank was lost", rank=0, was_killed=True, cause=RankLossCause.EXITED))
        self._sent.clear()
        self._ahead, self.next_s, self.is_open = None, None, False
        for flight in self.flights.values():
            flight.pause(now_s)
        for update in loss.given_up:
            self._end(update.key, now_s)

    def start_ranks(self, now_s: float) -> None:
        """They are back, empty."""
        before = self._core.num_replayed_tokens_total
        self._core.on_started(self._pool)
        self.work.recomputed_tokens += self._core.num_replayed_tokens_total - before
        self._num_steps_of_life = 0
        self.is_open = True
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
        return leaving

    def _request(self, flight: Flight, output_ids: list[int]) -> SequenceRequest:
        arrival = flight.arrival
        prompt_ids = [FILLER_ID] * arrival.prompt_tokens
        if self._shared:
            # The first token of its own makes every later block one that no other prompt has.
            prompt_ids[min(self._shared, arrival.prompt_tokens - 1)] = flight.key + 2
        return SequenceRequest(
            key=flight.key,
            prompt_ids=prompt_ids,
            sampling=_GREEDY,
            max_tokens=arrival.output_tokens,
            starts_thinking=arrival.thinking_tokens > 0,
            think_end_id=THINK_END_ID,
            output_ids=output_ids,
            cache_salt=arrival.tenant,
        )

    @property
    def _oldest_ends_s(self) -> float:
        return self._started_s + self._sent[0].time.total_s

    def _send(self, now_s: float) -> None:
        """As many plans as may be under way."""
        if not self._sent:
            self._started_s = now_s
        while True:
            is_held = self._holds_prompts()
            if (plans := self._core.next_plans()) is None:
                break
            self._is_held = is_held
            groups = self.scheduler.groups
            shape = [_group_shape(plan, group) for plan, group in zip(plans, groups, strict=True)]
            is_decode = not any(group.prefill_tokens for group in shape)
            self._sent.append(_Sent(shape, self._cost.step(shape), is_decode))
            self._has_new = False

    def _holds_prompts(self) -> bool:
        """The next plan has none for as long as the pace must see what steps take without them."""
        pace = self.scheduler.pace
        return pace.is_limiting and self.num_waiting > 0 and pace.must_look(self.num_running)

    def _take_result(self, now_s: float) -> None:
        sent = self._sent.popleft()
        results = [self._result(group, sent.time.total_s, now_s) for group in self.scheduler.groups]
        self._count(sent, results)
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
        for seq in oldest.sampled:
            flight = self.flights.get(seq.request.key)
            num_before = len(seq.output_ids)
            if flight is None:
                token_ids.append(FILLER_ID)  # it has ended: nobody gets this one
                continue
            num_thinking = flight.arrival.thinking_tokens
            token_ids.append(THINK_END_ID if num_before == num_thinking - 1 else FILLER_ID)
            if num_before == 0:
                flight.first_token_s = now_s
            if flight.paused_s is not None:
                flight.go_on(now_s)
            if num_before == num_thinking:
                flight.first_answer_s = now_s
        return StepResult(oldest.step, 0, token_ids, compute_s=step_s)

    def _end(self, key: Hashable, now_s: float) -> None:
        flight = self.flights.pop(key)
        flight.end_s = now_s
        self._on_end(flight)

    def _count(self, sent: _Sent, results: list[StepResult]) -> None:
        work, total_s = self.work, sent.time.total_s
        work.take(sent.time, total_s, 1, self.kv_share)
        work.num_decided_steps += 1
        work.decode_tokens += sum(len(result.token_ids) for result in results)
        work.prefill_tokens += sum(group.prefill_tokens for group in sent.shape)
        work.gaps.add(total_s, sum(group.num_decodes for group in sent.shape))

    # Steps that are foreseen

    def _look_ahead(self) -> None:
        """Find out when something happens next, and whether it is known until then."""
        self._ahead = None
        if not self._sent:
            self.next_s = None
            return
        num_steps = self._foresee()
        if num_steps < _WORTH_SKIPPING:
            self.next_s = self._oldest_ends_s
            return
        growth_s = _largest([(self._cost.context_s(group), self._growth_s(group)) for group in self._sent[0].shape])[1]
        first_s = self._sent[0].time.total_s
        self._ahead = _Ahead(self._started_s, num_steps, first_s, growth_s)
        self.next_s = self._ahead.behind(num_steps)

    def _foresee(self) -> int:
        if not self._may_skip or self._is_held or not all(sent.is_decode for sent in self._sent):
            return 0
        scheduler, max_num_seqs = self.scheduler, self._config.max_num_seqs
        if self._has_new and any(group.num_unfinished < max_num_seqs for group in scheduler.groups):
            return 0
        times = [(self._cost.context_s(group), self._growth_s(group)) for group in self._sent[0].shape]
        return min(foresee(scheduler), _steps_until_overtaken(times))

    def _growth_s(self, group: GroupShape) -> float:
        """What the next step's KV takes beyond this one's."""
        return self._cost.context_s(GroupShape(group.num_decodes, group.num_decodes))

    def _settle(self, now_s: float) -> None:
        """Write what was foreseen until now."""
        ahead, self._ahead = self._ahead, None
        num_steps = ahead.done_by(now_s) if ahead is not None else 0
        if ahead is None or not num_steps:
            return
        flights, work = self.flights, self.work
        for key, result in skip(self.scheduler, num_steps, lambda key: flights[key].arrival.thinking_tokens):
            flights[key].first_answer_s = ahead.behind(result)
        total_s = ahead.behind(num_steps) - ahead.start_s
        num_decodes = sum(group.num_decodes for group in self._sent[0].shape)
        middle = self._cost.step(_later(self._sent[0].shape, num_steps // 2))
        work.take(middle, total_s, num_steps, self.kv_share)
        work.decode_tokens += num_steps * num_decodes
        work.gaps.add(total_s / num_steps, num_steps * num_decodes)
        pass_time(self.scheduler, num_steps, lambda step: ahead.first_s + step * ahead.growth_s)
        self._num_steps_of_life += num_steps
        self._started_s = ahead.behind(num_steps)
        for key in end_those_who_are_full(self.scheduler):
            self._end(key, self._started_s)
        self._sent.clear()
        for plans in zip(*map(contexts, self.scheduler.groups), strict=True):
            shape = [GroupShape(count, context) for count, context in plans]
            self._sent.append(_Sent(shape, self._cost.step(shape), is_decode=True))


def _later(shape: StepShape, num_steps: int) -> StepShape:
    """The same decodes, so many tokens further on."""
    return [GroupShape(group.num_decodes, group.decode_context + num_steps * group.num_decodes) for group in shape]


def _largest(times: list[tuple[float, float]]) -> tuple[float, float]:
    """Of the (time, growth) of groups."""
    return max(times)


def _steps_until_overtaken(times: list[tuple[float, float]]) -> int:
    """For so many steps the group that spends most on its KV stays that."""
    most_s, growth_s = _largest(times)
    steps = [int((most_s - now_s) / (more_s - growth_s)) for now_s, more_s in times if more_s > growth_s]
    return min(steps, default=1 << 30)


def _group_shape(plan: StepPlan, group: Scheduler) -> GroupShape:
    """Of the plan that this group was sent last."""
    newest = group.in_flight.newest
    num_prefilled = len(plan.prefills)
    # A decode reads all that is computed before it, itself included.
    context = sum(seq.num_computed for seq in newest.computed[num_prefilled:])
    sizes = [(prefill.start, len(prefill.token_ids)) for prefill in plan.prefills]
    return GroupShape(
        num_decodes=len(plan.decodes),
        decode_context=context,
        prefill_tokens=sum(size for _, size in sizes),
        prefill_pairs=sum(chunk_pairs(start, size) for start, size in sizes),
        num_prefills=num_prefilled,
    )
