"""Small sums through memory that ranks share, by the same code as on GPUs: the rank's memory is a fake over gloo."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.workers.ranks import RankProcesses
from workers import symmetric_group
from workers.host import shares_temporary_files
from workers.kernels.ordered_sum import sum_in_order
from workers.parallel import ParallelState
from workers.rank_group import RankGroup
from workers.symmetric_group import (
    ALLOW_EQUAL_NUMBERS,
    DTYPES,
    MOST_BYTES,
    OneShotSum,
    SymmetricGroup,
    is_small_sum,
    offer_cuda_memory,
    share_symmetric_memory,
)

CPU = torch.device("cpu")


class GatheredSum:
    """What the kernel does, by a gather of everybody's part."""

    def __init__(self, group: RankGroup) -> None:
        self.group, self.num_calls = group, 0

    def add_up(self, x_n: Tensor) -> None:
        self.num_calls += 1
        x_n.copy_(sum_in_order(self.group.all_gather(x_n)))


class ReversedSum(GatheredSum):
    """Adds in another order."""

    def add_up(self, x_n: Tensor) -> None:
        x_n.copy_(sum_in_order(self.group.all_gather(x_n).flip(0).contiguous()))


def offer_gathered(group: RankGroup, device: torch.device) -> OneShotSum | None:
    del device
    return GatheredSum(group)


def offer_on_all_but_the_last(group: RankGroup, device: torch.device) -> OneShotSum | None:
    return None if group.index == group.size - 1 else offer_gathered(group, device)


def offer_reversed(group: RankGroup, device: torch.device) -> OneShotSum | None:
    del device
    return ReversedSum(group)


def over_sockets(parallel: ParallelState) -> RankGroup:
    return RankGroup(parallel.world.index, parallel.world.size, parallel.world.process_group)


def is_shared(parallel: ParallelState, offer: Callable[..., OneShotSum | None]) -> bool:
    return isinstance(share_symmetric_memory(over_sockets(parallel), CPU, offer), SymmetricGroup)


def sums_both_ways(parallel: ParallelState) -> list[tuple[bool, bool]]:
    """For tensors small and large, of both types: whether the bits are the same, and whether one shot gave them."""
    plain, gathered = over_sockets(parallel), GatheredSum(over_sockets(parallel))
    shared, answers = SymmetricGroup(plain, gathered), []
    for dtype in DTYPES:
        for num_bytes in (16, 4096, MOST_BYTES, MOST_BYTES + 16, 4096 + 4):
            generator = torch.Generator().manual_seed(num_bytes + parallel.rank)
            x = (torch.randn(num_bytes // dtype.itemsize, generator=generator) * 10.0**parallel.rank).to(dtype)
            gathered.num_calls = 0
            is_same = torch.equal(shared.all_reduce(x.clone()), plain.all_reduce(x))
            answers.append((is_same, gathered.num_calls == 1))
    return answers


def test_small_sums_take_one_shot_and_all_have_the_bits_of_any_group(four_ranks: RankProcesses) -> None:
    for answers in four_ranks.run(sums_both_ways):
        assert answers == [(True, True), (True, True), (True, True), (True, False), (True, False)] * len(DTYPES)


def test_the_memory_is_taken_where_all_ranks_have_it(four_ranks: RankProcesses) -> None:
    assert four_ranks.run(is_shared, offer_gathered) == [True] * 4
    assert four_ranks.run(is_shared, offer_on_all_but_the_last) == [False] * 4


def test_memory_that_gives_other_bits_is_not_taken(four_ranks: RankProcesses) -> None:
    assert four_ranks.run(is_shared, offer_reversed) == [False] * 4


def test_a_tensor_that_the_kernel_cannot_take_goes_another_way() -> None:
    x = torch.zeros(64)

    assert is_small_sum(x)
    assert not is_small_sum(x[1:5]), "not aligned"
    assert not is_small_sum(x.view(8, 8)[:, :4]), "not contiguous"
    assert not is_small_sum(x.double())
    assert not is_small_sum(x[:0])


def meets_in(parallel: ParallelState, directories: list[str]) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", directories[parallel.rank])
        return shares_temporary_files(over_sockets(parallel), CPU)


def test_ranks_that_see_no_directory_together_do_not_wait_for_one_another_there(
    four_ranks: RankProcesses, tmp_path: Path
) -> None:
    here, there = (str(tmp_path / name) for name in ("here", "there"))
    for directory in (here, there):
        Path(directory).mkdir()
    assert four_ranks.run(meets_in, [here] * 4) == [True] * 4
    assert four_ranks.run(meets_in, [here, here, there, there]) == [False] * 4


def offered_settings(parallel: ParallelState) -> list[str | None]:
    """What torch finds in the environment when it is asked for the memory."""
    found: list[str | None] = []

    class Asked:
        def __init__(self, *_: object) -> None:
            found.append(os.environ.get(ALLOW_EQUAL_NUMBERS[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(ALLOW_EQUAL_NUMBERS[0], raising=False)
        patch.setattr(symmetric_group, "CudaOneShotSum", Asked)
        offer_cuda_memory(over_sockets(parallel), CPU)
    return found


def test_ranks_that_all_call_their_gpu_number_0_may_share_memory(four_ranks: RankProcesses) -> None:
    assert four_ranks.run(offered_settings) == [["1"]] * 4
