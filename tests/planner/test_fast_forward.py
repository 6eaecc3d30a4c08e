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
from cluster.router.scheduler_config import SchedulerConfig
from tests.real_models import QWEN3_235B
from workers.layout import ParallelLayout


def fleet(seed: int, *, may_skip: bool) -> Fleet:
    """Of a shape that the seed decides: groups, slots, a pool that is large or scarce, plans ahead, shared prompts."""
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
        assert flight.first_token_s == pytest.approx(expected.first_token_s, rel=1e-9)
        assert flight.first_answer_s == pytest.approx(expected.first_answer_s, rel=1e-9)
        assert flight.end_s == pytest.approx(expected.end_s, rel=1e-9)
    for name, copy in together.copies.items():
        other = one_by_one.copies[name]
        assert copy.work.num_steps == other.work.num_steps
        assert copy.work.busy_s == pytest.approx(other.work.busy_s, rel=1e-9)
        assert copy.work.decode_tokens == other.work.decode_tokens
        assert copy.scheduler.stats.num_preempted_total == other.scheduler.stats.num_preempted_total
        assert copy.scheduler.stats.num_free_blocks == copy.scheduler.stats.num_blocks


def test_most_steps_of_long_thoughts_are_foreseen() -> None:
    calm = fleet(1, may_skip=True)

    calm.run([Arrival(0.0, 50, 300, 20)])

    work = next(copy.work for copy in calm.copies.values() if copy.work.num_steps)
    assert work.num_steps == 321  # two for the prompt in chunks, the second with the first token
    assert work.num_decided_steps < 20
