"""Collectives through shared memory: the same bits as over sockets, bounded waits, and nothing left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.workers.ranks import RankProcesses
from workers.errors import PeerLate
from workers.host_group import HALF_BYTES, HostGroup, share_memory
from workers.parallel import ParallelState
from workers.rank_group import RankGroup

SIZES = [1, 7, 16, 1000, HALF_BYTES // 4, HALF_BYTES // 4 + 5, HALF_BYTES]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[RankProcesses]:
    processes = RankProcesses(request.param)
    yield processes
    processes.stop()


def both_ways(parallel: ParallelState, size: int) -> tuple[list[bytes], list[bytes]]:
    """Sum and gather of one random tensor through shared memory, and over sockets."""
    shared = parallel.world
    assert isinstance(shared, HostGroup)
    sockets = RankGroup(shared.index, shared.size, shared.process_group)
    results = []
    for group in (shared, sockets):
        x = torch.randn(size, generator=torch.Generator().manual_seed(shared.index))
        keys = (x * 1000).long()
        results.append([bytes(t.numpy().tobytes()) for t in (group.all_gather(keys), group.all_reduce(x))])
    return results[0], results[1]


def test_shared_memory_gives_the_bits_that_sockets_give(ranks: RankProcesses) -> None:
    for size in SIZES:
        answers = ranks.run(both_ways, size)
        for shared, sockets in answers:
            assert shared == sockets == answers[0][0], f"{size} floats"


def rows_both_ways(parallel: ParallelState, seed: int, width: int) -> bool:
    """Uneven rows between all ranks, some none at all: whether shared memory and sockets bring the same."""
    shared = parallel.world
    assert isinstance(shared, HostGroup)
    sockets = RankGroup(shared.index, shared.size, shared.process_group)
    counts = torch.randint(0, 40, (shared.size, shared.size), generator=torch.Generator().manual_seed(seed))
    counts[seed % shared.size] = 0
    send, receive = counts[shared.index].tolist(), counts[:, shared.index].tolist()
    rows = torch.randn(sum(send), width, generator=torch.Generator().manual_seed(shared.index))
    return torch.equal(shared.all_to_all(rows, send, receive), sockets.all_to_all(rows, send, receive))


def test_uneven_rows_arrive_as_over_sockets_whatever_their_number(ranks: RankProcesses) -> None:
    for seed, width in enumerate([1, 16, 2048, 8192]):
        assert all(ranks.run(rows_both_ways, seed, width)), f"rows of {width} floats"


def many_sums(parallel: ParallelState, count: int) -> list[float]:
    """Sums of one number after another; ranks drift apart in between."""
    totals = []
    for step in range(count):
        if step % 97 == parallel.rank:
            time.sleep(0.001)
        totals.append(float(parallel.world.all_reduce(torch.tensor([float(step * (parallel.rank + 1))]))))
    return totals


def test_no_sum_is_mixed_up_with_the_next(ranks: RankProcesses) -> None:
    answers = ranks.run(many_sums, 2000)
    weights = sum(rank + 1 for rank in range(len(answers)))
    assert all(totals == [float(step * weights) for step in range(2000)] for totals in answers)


def wait_alone(parallel: ParallelState) -> str:
    """Only rank 0 asks for a sum, in a group of its own that the others have joined."""
    world = parallel.world
    group = share_memory(RankGroup(world.index, world.size, world.process_group), timeout_s=0.2)
    if parallel.rank > 0:
        return ""
    start_s = time.monotonic()
    with pytest.raises(PeerLate) as caught:
        group.all_reduce(torch.ones(3))
    assert time.monotonic() - start_s >= 0.2
    return str(caught.value)


def test_a_rank_that_does_not_come_is_named_in_time(ranks: RankProcesses) -> None:
    message, *_ = ranks.run(wait_alone)
    assert "place 1" in message
    assert "0.2 s" in message


def names_in_use(parallel: ParallelState) -> list[str]:
    assert isinstance(parallel.world, HostGroup)
    return [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/mull-" in line]


def test_the_memory_has_no_name_once_all_have_it(ranks: RankProcesses) -> None:
    for names in ranks.run(names_in_use):
        assert names
        assert set(names) == {"(deleted)"}
