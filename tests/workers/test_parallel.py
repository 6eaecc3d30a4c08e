"""Collectives over real processes: sums in rank order, and waits that end."""

from __future__ import annotations

import os
import threading
import time
from functools import reduce

import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its stubs do not re-export it

from tests.workers.ranks import RankProcesses
from workers.errors import PeerLate
from workers.layout import ParallelLayout
from workers.parallel import ParallelState
from workers.rank_group import ONE_ROUND_BYTES, RankGroup

SIZES = [0, 1, 7, ONE_ROUND_BYTES // 4, ONE_ROUND_BYTES // 4 + 1, 100_003]


def part_of(rank: int, size: int) -> Tensor:
    """Of very different magnitudes, so that every order of adding gives another sum."""
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


def sums(parallel: ParallelState) -> list[Tensor]:
    return [parallel.world.all_reduce(part_of(parallel.rank, size)) for size in SIZES]


def sums_of_groups(parallel: ParallelState, layout: ParallelLayout) -> list[Tensor]:
    tp = parallel.regrouped(layout, 60.0).tp
    return [tp.all_reduce(part_of(parallel.rank, size)) for size in SIZES]


def test_sums_are_added_in_rank_order_whatever_their_size(four_ranks: RankProcesses) -> None:
    for got in four_ranks.run(sums):
        for size, total in zip(SIZES, got, strict=True):
            assert torch.equal(total, reduce(torch.add, [part_of(rank, size) for rank in range(4)])), size


def test_a_group_sums_its_own_ranks_alone(four_ranks: RankProcesses) -> None:
    for rank, got in enumerate(four_ranks.run(sums_of_groups, ParallelLayout(tp=2, dp=2))):
        first = rank // 2 * 2
        for size, total in zip(SIZES, got, strict=True):
            assert torch.equal(total, part_of(first, size) + part_of(first + 1, size))


def wait_for_a_rank_that_does_not_come(parallel: ParallelState) -> str:
    # Those who meet have all the time that they need.
    timeout_s = 2.0 if parallel.rank >= 2 else 60.0
    tp = parallel.regrouped(ParallelLayout(tp=2, dp=2), timeout_s).tp
    if parallel.rank == 3:
        return "did not come"
    start_s = time.monotonic()
    try:
        tp.all_reduce(torch.ones(4))
    except (RuntimeError, PeerLate):
        return "gave up in time" if time.monotonic() - start_s > 0.9 * timeout_s else "gave up too soon"
    return "met the other"


def test_a_wait_for_a_missing_rank_ends_at_the_timeout() -> None:
    ranks = RankProcesses(4)
    try:
        told = ranks.run(wait_for_a_rank_that_does_not_come)
    finally:
        ranks.stop()
    assert told == ["met the other", "met the other", "gave up in time", "did not come"]


def test_a_lost_rank_ends_no_process_that_has_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own way is to end it (3), or to let it compute on what was not summed (2)."""
    told: dict[str, str | None] = {}

    def note(backend: str, **_: object) -> None:
        told[backend] = os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING")
        raise ConnectionError

    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "")  # so that it is as before in the end
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    monkeypatch.setattr("workers.parallel.dist.init_process_group", note)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    with pytest.raises(ConnectionError):
        ParallelState.connect(0, ParallelLayout(tp=2), "127.0.0.1", store.port, "cuda", 5.0)

    assert told == {"nccl": "0"}


class Waited(RankGroup):
    """In which this rank waits."""

    def __init__(self) -> None:
        super().__init__(0, 2, None)
        self.is_woken = threading.Event()

    def abort(self) -> None:
        self.is_woken.set()


class Recorded(RankGroup):
    """Whose abort comes back when who waits in the other group has been woken, and drops what it has recorded."""

    def __init__(self, waited: Waited) -> None:
        super().__init__(0, 4, None)
        self._waited, self.is_gone = waited, False

    def abort(self) -> None:
        self.is_gone = self._waited.is_woken.wait(60)


def test_a_group_that_is_recorded_does_not_keep_the_other_from_being_aborted() -> None:
    recorded = Recorded(waited := Waited())
    ParallelState(0, ParallelLayout(tp=2, dp=2), recorded, waited).abort()
    assert recorded.is_gone
