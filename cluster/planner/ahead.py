"""Steps of a copy whose ranks are the cost model: plans that are under way, and those that are foreseen behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cluster.planner.cost import CostModel
from cluster.planner.roofline import StepTime
from cluster.planner.step_shape import ENDLESS, GroupShape, StepShape, chunk_pairs
from cluster.router.pace import StepLoad
from cluster.router.scheduler import Scheduler
from workers.step import StepPlan


class Sent(NamedTuple):
    """A plan on its way."""

    load: StepLoad
    time: StepTime
    total_s: float
    num_sampled: int
    prefill_tokens: int
    """Of all groups."""

    @classmethod
    def of(cls, shape: StepShape, time: StepTime, num_sampled: int) -> Sent:
        """A plan of this shape."""
        num_decodes = sum([group.num_decodes for group in shape])
        prefills = [group.prefill_tokens for group in shape]
        return cls(StepLoad(num_decodes, max(prefills)), time, time.total_s, num_sampled, sum(prefills))

    @property
    def is_decode(self) -> bool:
        """Nothing else."""
        return not self.prefill_tokens


class Ahead(NamedTuple):
    """Those that are under way, then decodes of all who run: each lasts by `growth_s` longer than the one before."""

    start_s: float
    num_steps: int
    ends_s: Sequence[float]
    """When those under way are over."""
    decode: Sent
    """The first behind them."""
    growth_s: float

    def behind(self, num_steps: int) -> float:
        """When so many results are there."""
        num_more = num_steps - len(self.ends_s)
        if num_more > 0:
            return self.ends_s[-1] + num_more * self.decode.total_s + self.growth_s * num_more * (num_more - 1) / 2
        return self.ends_s[num_steps - 1] if num_steps else self.start_s

    def done_by(self, time_s: float) -> int:
        """Results that are there at a time."""
        if self.behind(self.num_steps) <= time_s:
            return self.num_steps
        lowest, highest = 0, self.num_steps - 1
        while lowest < highest:
            middle = (lowest + highest + 1) // 2
            lowest, highest = (middle, highest) if self.behind(middle) <= time_s else (lowest, middle - 1)
        return lowest

    def plan(self, number: int) -> Sent:
        """Of the decodes, the one so many behind the first."""
        first, more_s = self.decode, number * self.growth_s
        return Sent(first.load, first.time.later(more_s), first.total_s + more_s, first.num_sampled, 0)


def look_ahead(start_s: float, sent: Sequence[Sent], num_steps: int, next_shape: StepShape, cost: CostModel) -> Ahead:
    """`next_shape`: of the plan behind those under way, which foreseen ones follow; `num_steps`: results, at most."""
    time_s, ends_s = start_s, []
    for one in sent:
        time_s += one.total_s
        ends_s.append(time_s)
    growths = [cost.growth(group) for group in next_shape]
    num_alike = min([num_alike for _, num_alike in growths])
    times = [(cost.context_s(group), more_s) for group, (more_s, _) in zip(next_shape, growths, strict=True)]
    _, growth_s = max(times)
    if len(times) > 1:
        num_alike = min(num_alike, _steps_until_overtaken(times))
    num_steps = min(num_steps, 1 + num_alike)  # the last plan that is sent, too, is foreseen
    count = sum([group.num_decodes for group in next_shape])
    decode = Sent.of(next_shape, cost.step(next_shape), count)
    return Ahead(start_s, num_steps, ends_s, decode, growth_s)


def _steps_until_overtaken(times: Sequence[tuple[float, float]]) -> int:
    """For so many steps the group that spends most on its KV stays that."""
    most_s, growth_s = max(times)
    steps = [int((most_s - now_s) / (more_s - growth_s)) for now_s, more_s in times if more_s > growth_s]
    return min(steps, default=ENDLESS)


def group_shape(plan: StepPlan, group: Scheduler) -> GroupShape:
    """Of the plan that this group was sent last."""
    computed = group.in_flight.newest.computed
    prefills = plan.prefills
    if not prefills:
        # A decode reads all that is computed before it, itself included.
        return GroupShape(len(computed), sum([seq.num_computed for seq in computed]))
    sizes = [(prefill.start, len(prefill.token_ids)) for prefill in prefills]
    return GroupShape(
        num_decodes=len(plan.decodes),
        decode_context=sum([seq.num_computed for seq in computed[len(prefills) :]]),
        prefill_tokens=sum([size for _, size in sizes]),
        prefill_pairs=sum([chunk_pairs(start, size) for start, size in sizes]),
        num_prefills=len(prefills),
    )
