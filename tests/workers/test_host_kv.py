"""KV blocks that go to the host's memory and come back: every bit of them, in the right order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from cluster.router.blocks import BlockAllocator
from cluster.router.host_tier import HostPlan, HostTier
from cluster.router.scheduler import Scheduler
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import SequenceRequest
from tests.workers.engine import BLOCK_SIZE, GREEDY, load, run, runner_config
from workers.errors import KVMemoryError, PlanError
from workers.host import HostMemoryShare, share_of_host_memory
from workers.host_kv import BATCH_BLOCKS, HostKV, open_host_kv
from workers.rank_group import RankGroup
from workers.runner import ModelRunner
from workers.step import OpenSlot, Prefill, StepPlan

PROMPT = [(7 * i) % 90 for i in range(3 * BLOCK_SIZE + 5)]
OTHER = [(11 * i + 3) % 90 for i in range(len(PROMPT))]
TABLE = [4, 2, 9, 7]


@pytest.fixture(scope="module")
def runner(dense_fp8: Path) -> ModelRunner:
    return load(dense_fp8, host_kv_bytes=2**24)


class Recorder:
    """A stream that notes what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    @contextmanager
    def after_compute(self) -> Iterator[None]:
        self.calls.append("after compute")
        yield

    def hold_compute(self) -> None:
        self.calls.append("hold compute")


def opening(token_ids: list[int], *, num_cached: int = 0, step: int = 0) -> StepPlan:
    opened = OpenSlot(0, TABLE, num_cached, GREEDY)
    return StepPlan(step, open=[opened], prefills=[Prefill(0, num_cached, token_ids[num_cached:], True)])


def test_what_was_written_over_comes_back_bit_for_bit(runner: ModelRunner) -> None:
    # given: a prompt whose first three blocks were kept, and blocks that hold another one by now
    alone = run(runner, [opening(PROMPT), StepPlan(1, decodes=[0])])
    kept = [layer[:, TABLE[:3]].clone() for layer in runner.kv.layers]
    offload = [(block, host) for block, host in zip(TABLE[:3], (5, 0, 3), strict=True)]
    over = opening(OTHER, step=2)
    run(runner, [StepPlan(2, offload, [], [0], over.open, over.extend, over.prefills)])

    # when: they are brought back to blocks in another order
    table = [9, 4, 2, 7]
    fetch = [(host, block) for host, block in zip((5, 0, 3), table[:3], strict=True)]
    start = 3 * BLOCK_SIZE
    opened = OpenSlot(0, table, start, GREEDY)
    plan = StepPlan(3, [], fetch, [0], [opened], prefills=[Prefill(0, start, PROMPT[start:], True)])
    again = run(runner, [plan, StepPlan(4, decodes=[0])])
    run(runner, [StepPlan(5, close=[0])])

    for layer, before in zip(runner.kv.layers, kept, strict=True):
        assert torch.equal(layer[:, table[:3]], before)
    assert again.tokens == alone.tokens


def test_more_blocks_than_a_batch_keep_their_places(runner: ModelRunner) -> None:
    cache, count = runner.kv.layers[0], 2 * BATCH_BLOCKS + 3
    host = HostKV(runner.kv, count)
    cache.copy_(torch.randn_like(cache))
    before = cache.clone()

    host.move(StepPlan(0, offload=[(block, count - 1 - block) for block in range(count)]))
    cache.zero_()
    host.move(StepPlan(1, fetch=[(count - 1 - block, block) for block in range(count)]))

    assert torch.equal(cache[:, :count], before[:, :count])


def test_blocks_in_fp8_keep_their_bits(runner: ModelRunner) -> None:
    codes = [torch.randint(0, 256, (4, 8, 16, 2), dtype=torch.uint8) for _ in range(2)]
    kv = copy(runner.kv)
    kv.layers = [layer.clone().view(torch.float8_e4m3fn) for layer in codes]
    host = HostKV(kv, 4)

    host.move(StepPlan(0, offload=[(1, 2), (6, 0)], fetch=[(2, 5), (0, 3)]))

    for layer, before in zip(kv.layers, codes, strict=True):
        assert torch.equal(layer.view(torch.uint8)[:, [5, 3]], before[:, [1, 6]])


def test_computing_waits_for_what_comes_back_in_the_plan_that_needs_it(runner: ModelRunner) -> None:
    stream = Recorder()
    host = HostKV(runner.kv, 4, stream)
    host.move(StepPlan(0, offload=[(0, 0)]))
    assert stream.calls == ["hold compute", "after compute"], "an earlier batch of copies may be in the staging buffer"
    stream.calls.clear()

    host.move(StepPlan(1, fetch=[(0, 1)]))
    assert stream.calls == ["after compute"], "the step that runs beside the copy waited for it"
    host.move(StepPlan(2, open=[OpenSlot(0, [1], BLOCK_SIZE, GREEDY)]))
    assert stream.calls == ["after compute", "hold compute"]
    host.move(StepPlan(3))
    assert stream.calls == ["after compute", "hold compute"], "computing waited twice"


def test_computing_waits_where_the_same_plan_opens_a_slot_with_it(runner: ModelRunner) -> None:
    stream = Recorder()
    host = HostKV(runner.kv, 4, stream)

    host.move(StepPlan(1, fetch=[(0, 1)], open=[OpenSlot(0, [1, 2], BLOCK_SIZE, GREEDY)]))

    assert stream.calls == ["after compute", "hold compute"]


@pytest.mark.parametrize("plan", [StepPlan(0, offload=[(0, 9)]), StepPlan(0, fetch=[(0, 10**6)])])
def test_a_copy_of_a_block_that_does_not_exist_is_refused(plan: StepPlan, runner: ModelRunner) -> None:
    host = HostKV(runner.kv, 4)

    with pytest.raises(PlanError, match="copies between block"):
        host.move(plan)


def test_a_rank_without_such_memory_refuses_to_copy(dense_fp8: Path) -> None:
    with pytest.raises(PlanError, match="host_kv_bytes"):
        load(dense_fp8).execute(StepPlan(0, offload=[(0, 0)]))


def test_memory_that_the_host_has_not_is_refused_at_the_start(dense_fp8: Path) -> None:
    with pytest.raises(KVMemoryError, match=r"engine\.host_kv_bytes"):
        load(dense_fp8, host_kv_bytes=psutil.virtual_memory().total * 2)
    with pytest.raises(KVMemoryError, match="a block takes"):
        load(dense_fp8, host_kv_bytes=1)


class Told(RankGroup):
    """Of four ranks of which the last two are on another host; the one beside this one sees half as much as free."""

    def __init__(self) -> None:
        super().__init__(0, 4, None)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        number, free_bytes = x.tolist()
        return torch.tensor([[number, free_bytes], [number, free_bytes // 2], [number + 1, 0], [number + 1, 0]])


def test_ranks_of_one_host_share_its_memory(
    dense_fp8: Path, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.host.psutil.virtual_memory", lambda: SimpleNamespace(available=8_000_000_000))

    assert share_of_host_memory(Told(), torch.device("cpu")) == HostMemoryShare(4_000_000_000, num_ranks=2)
    config = runner_config(dense_fp8, host_kv_bytes=2_100_000_000)
    with pytest.raises(KVMemoryError, match=r"keep 2\.1 GB .* where 4 are free, 2 for each of its 2 ranks; a block"):
        open_host_kv(config, runner.kv, 1_000_000, Told())


def test_what_a_rank_measures_is_plausible(runner: ModelRunner) -> None:
    memory = runner.host_memory

    assert memory is not None
    assert memory.num_blocks == 2**24 * runner.num_blocks // runner.kv_bytes
    assert 0 < memory.copy_s < memory.step_s, "a block of this model is smaller than its weights"
    assert memory.token_s >= 0


def test_sequences_that_give_way_say_the_same_as_with_room_for_all(runner: ModelRunner) -> None:
    def tokens(num_blocks: int, host: HostPlan | None) -> tuple[dict[object, list[int]], Scheduler]:
        tier = None if host is None else HostTier(host)
        config = SchedulerConfig(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=256)
        scheduler = Scheduler(config, BlockAllocator(num_blocks, BLOCK_SIZE, True, tier))
        for key in range(5):
            prompt = [(13 * key + i) % 90 for i in range(20 + 7 * key)]
            scheduler.add(SequenceRequest(key=key, prompt_ids=prompt, sampling=GREEDY, max_tokens=60))
        told: dict[object, list[int]] = {key: [] for key in range(5)}
        while (plan := scheduler.schedule()) is not None:
            for update in scheduler.apply(runner.execute(plan)):
                told[update.key] += update.token_ids
        run(runner, [StepPlan(0, close=[slot for slot, is_open in enumerate(runner.slots.is_open) if is_open])])
        return told, scheduler

    roomy, _ = tokens(64, None)
    tight, scheduler = tokens(14, HostPlan(num_blocks=30, blocks_per_step=2))

    assert scheduler.stats.num_preempted_total > 0
    assert scheduler.stats.fetched_tokens_total > 0
    assert tight == roomy
