"""Steps taken together end where the scheduler's own steps end, whatever the load."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cluster.planner.devices import find_device, published_kernels
from cluster.planner.fleet import Fleet
from cluster.planner.flights import Flight
from cluster.planner.rank_work import rank_work
from cluster.planner.roofline import Roofline
from cluster.planner.sim_copy import SimCopy
from cluster.planner.workload import Arrival
from cluster.router.engine_core import Pool
from cluster.router.pace import PromptPace, StepLoad
from cluster.router.scheduler_config import SchedulerConfig
from tests.real_models import QWEN3_235B
from workers.layout import ParallelLayout


def fleet(seed: int, *, may_skip: bool) -> Fleet:
    """Of a shape that the seed decides: groups, slots, queues and pools, plans ahead, pace, shared prompts."""
    draw = random.Random(seed)
    layout = ParallelLayout(tp=4, dp=draw.choice([1, 1, 2]))
    work = rank_work(QWEN3_235B, layout, redundant_experts=0, kv_itemsize=2)
    cost = Roofline(QWEN3_235B, layout, work, find_device("h200"), published_kernels())
    config = SchedulerConfig(
        max_model_len=400,
        max_num_seqs=draw.choice([2, 8, 32]),
        max_num_batched_tokens=draw.choice([32, 64, 256]),
        max_in_flight=draw.choice([1, 2]),
        max_prefill_slowdown=draw.choice([None, 1.2, 2.5]),
        max_waiting=draw.choice([1, 4, 256]),
    )
    pool = Pool(num_groups=layout.dp, num_blocks=draw.choice([24, 60, 1000]), block_size=16)
    shared = draw.choice([0, 0, 48])

    def make(number: int, on_end: Callable[[Flight], object]) -> SimCopy:
        return SimCopy(number, cost, config, pool, on_end=on_end, shared_prompt_tokens=shared, may_skip=may_skip)

    return Fleet(make, draw.choice([1, 1, 3]))


def load(seed: int) -> list[Arrival]:
    draw = random.Random(seed)
    rate = draw.choice([0.5, 5.0, 50.0])
    now_s, arrivals = 0.0, []
    for _ in range(60):
        now_s += draw.expovariate(rate)
        arrivals.append(
            Arrival(now_s, draw.randint(1, 150), draw.choice([0, draw.randint(1, 120)]), draw.randint(1, 60))
        )
    return arrivals


@pytest.mark.parametrize("seed", range(60))
def test_foreseen_steps_are_those_that_the_scheduler_decides(seed: int) -> None:
    one_by_one, together = fleet(seed, may_skip=False), fleet(seed, may_skip=True)

    one_by_one.run(load(seed))
    together.run(load(seed))

    for expected, flight in zip(one_by_one.flights, together.flights, strict=True):
        assert flight.was_refused == expected.was_refused
        if flight.was_refused:
            continue
        assert flight.first_token_s == pytest.approx(expected.first_token_s, rel=1e-9)
        assert flight.first_answer_s == pytest.approx(expected.first_answer_s, rel=1e-9)
        assert flight.end_s == pytest.approx(expected.end_s, rel=1e-9)
    for name, copy in together.copies.items():
        other = one_by_one.copies[name]
        assert copy.work.num_steps == other.work.num_steps
        assert copy.work.busy_s == pytest.approx(other.work.busy_s, rel=1e-9)
        assert copy.work.decode_tokens == other.work.decode_tokens
        assert copy.scheduler.stats == other.scheduler.stats  # preemptions, and hits in the prefix cache
        assert copy.scheduler.stats.num_free_blocks == copy.scheduler.stats.num_blocks


@pytest.mark.parametrize("seed", range(40))
def test_in_the_middle_of_foreseen_steps_the_scheduler_is_where_single_steps_bring_it(seed: int) -> None:
    one_by_one, together = fleet(seed, may_skip=False), fleet(seed, may_skip=True)
    until_s = random.Random(seed).uniform(0.2, 1.5) * load(seed)[-1].time_s

    for one in (one_by_one, together):
        one.run(load(seed), until_s=until_s)
        one.now_s = until_s
        one.catch_up()

    for name, copy in together.copies.items():
        assert states(copy) == states(one_by_one.copies[name])
        pace, expected = copy.scheduler.pace, one_by_one.copies[name].scheduler.pace
        if not pace.is_limiting:
            continue
        assert (pace._plain_s or 0.0) == pytest.approx(expected._plain_s or 0.0, rel=1e-9)
        assert (pace._token_s or 0.0) == pytest.approx(expected._token_s or 0.0, rel=1e-9)
        assert list(pace._in_flight) == list(expected._in_flight)


def states(copy: SimCopy) -> list[tuple[object, ...]]:
    """All that a scheduler knows of its sequences, but for the names of blocks; and the plans under way."""
    found: list[tuple[object, ...]] = []
    for group in copy.scheduler.groups:
        for seq in sorted(group.sequences, key=lambda seq: seq.arrival):
            found.append((seq.request.key, seq.output_ids, seq.phase, seq.num_thinking, seq.slot, len(seq.block_ids)))
            found.append((seq.num_computed, seq.prefill_end, seq.num_pending, seq.num_preemptions, seq.num_published))
        found += [tuple(sorted(str(seq.request.key) for seq in plan.sampled)) for plan in group.in_flight]
        found.append((group.blocks.num_free, group.blocks.num_cached, group.num_waiting))
    return found


def test_most_steps_of_long_thoughts_are_foreseen() -> None:
    calm = fleet(1, may_skip=True)

    calm.run([Arrival(0.0, 50, 300, 20)])

    work = next(copy.work for copy in calm.copies.values() if copy.work.num_steps)
    assert work.num_steps == 321  # two for the prompt in chunks, the second with the first token
    assert work.num_decided_steps < 20


@pytest.mark.parametrize(
    ("known_s", "growth_s"), [(None, 0.0), (0.01, 1e-8), (0.5, 1e-6), (0.0201, 1e-7), (0.02, 1e-4)]
)
@pytest.mark.parametrize("count", [1, 2, 5, 60, 1000])
def test_the_pace_learns_the_same_from_steps_together_as_one_by_one(
    known_s: float | None, growth_s: float, count: int
) -> None:
    one_by_one, together = PromptPace(2.0), PromptPace(2.0)
    for pace in (one_by_one, together):
        pace.sent(StepLoad(8, 0))
        if known_s is not None:
            pace.took(known_s)
            pace.sent(StepLoad(8, 0))

    for step in range(count):
        one_by_one.took(0.02 + step * growth_s)
        one_by_one.sent(StepLoad(8, 0))
    together.took_alike(0.02, growth_s, count)

    assert together._plain_s == pytest.approx(one_by_one._plain_s, rel=1e-9)
