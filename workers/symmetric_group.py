"""GPUs of one host: small sums by reading each other's memory, in one kernel, instead of NCCL's rounds.

A decode step has two sums of a few kilobytes in every layer, whose time is latency alone. torch's symmetric memory is
alpha: it is taken where all ranks of a group have it, and only after it has given the bits that the group gives
without. The bits are the same, since its one-shot sum adds in rank order, in the tensor's own type (torch 2.13,
CUDASymmetricMemory-inl.h). Larger tensors go the way of any group: one shot moves W - 1 times their bytes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from workers.host import shares_temporary_files
from workers.rank_group import RankGroup

log = logging.getLogger(__name__)

MOST_BYTES = 256 * 2**10
"""Of a sum. 128 rows of the 235B's decode are 1 MiB: those are worth two rounds."""
ALIGNMENT_BYTES = 16
DTYPES = (torch.bfloat16, torch.float32)
ALLOW_EQUAL_NUMBERS = ("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
"""Every rank sees its own GPU alone, which is number 0 to all of them: torch would take them for one GPU, and refuse.
What this takes away in turn is multicast, which one shot does not use."""
SIZES = (2, 4, 8)
"""Of groups, that have kernels of their own."""


class OneShotSum(Protocol):
    """Memory that all ranks of a group read."""

    def add_up(self, x_n: Tensor) -> None:
        """Sum over ranks in rank order, in place. All ranks call it together."""


Offer = Callable[[RankGroup, torch.device], OneShotSum | None]
"""All ranks of a group call it together. None: this rank has no such memory."""


class CudaOneShotSum:
    """torch's kernel, which copies `x_n` to this rank's part, waits for the others, and adds up theirs and its own."""

    def __init__(self, process_group: dist.ProcessGroup, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory

        self._group_name = process_group.group_name
        self._buffer = symmetric_memory.empty(MOST_BYTES, dtype=torch.uint8, device=device)
        symmetric_memory.rendezvous(self._buffer, process_group)

    def add_up(self, x_n: Tensor) -> None:
        # The kernel takes as many elements as the buffer has. Each of its threads reads and writes the same places.
        part_n = self._buffer[: x_n.nbytes].view(x_n.dtype)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(part_n, x_n, "sum", self._group_name, x_n)


class SymmetricGroup(RankGroup):
    """A group whose ranks read each other's memory for small sums; everything else goes the way of any group."""

    def __init__(self, group: RankGroup, one_shot: OneShotSum) -> None:
        super().__init__(group.index, group.size, group.process_group)
        self._one_shot = one_shot

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place, in rank order."""
        if not is_small_sum(x):
            return super().all_reduce(x)
        self.num_exchanges += 1
        self.num_sent_bytes += x.nbytes * (self.size - 1)
        self._one_shot.add_up(x.view(-1))
        return x


def is_small_sum(x: Tensor) -> bool:
    """Whether one kernel sums it: known to all ranks alike, since they sum tensors of one shape."""
    is_aligned = x.data_ptr() % ALIGNMENT_BYTES == 0 and x.nbytes % ALIGNMENT_BYTES == 0
    return 0 < x.nbytes <= MOST_BYTES and is_aligned and x.dtype in DTYPES and x.is_contiguous()


def share_symmetric_memory(group: RankGroup, device: torch.device, offer: Offer | None = None) -> RankGroup:
    """The same group with small sums through symmetric memory, where all of its ranks can; all call this together."""
    if group.size not in SIZES:
        return group
    one_shot = (offer or offer_cuda_memory)(group, device)
    if not group.minimum(int(one_shot is not None), device):
        log.info("%d ranks sum through NCCL alone: not all of them have symmetric memory", group.size)
        return group
    assert one_shot is not None, "the smallest of the ranks' answers is ours, too"
    shared = SymmetricGroup(group, one_shot)
    if not group.minimum(int(_gives_the_same(shared, group, device)), device):
        log.warning("%d ranks sum through NCCL alone: symmetric memory gave other bits", group.size)
        return group
    return shared


def offer_cuda_memory(group: RankGroup, device: torch.device) -> OneShotSum | None:
    """Where all ranks run on one machine and meet in one directory there, and its GPUs reach each other."""
    if not shares_temporary_files(group, device):
        return None
    os.environ.setdefault(*ALLOW_EQUAL_NUMBERS)
    assert group.process_group is not None, "a group of several ranks has one"
    try:
        return CudaOneShotSum(group.process_group, device)
    except (ImportError, RuntimeError) as error:
        log.info("no symmetric memory: %s", str(error).partition("\n")[0])
        return None


def _gives_the_same(shared: RankGroup, group: RankGroup, device: torch.device) -> bool:
    """Of magnitudes so different that every order of adding gives another sum."""
    generator = torch.Generator().manual_seed(group.index)
    for dtype in DTYPES:
        x = (torch.randn(4096, generator=generator) * 8.0**group.index).to(device, dtype)
        if not torch.equal(shared.all_reduce(x.clone()), group.all_reduce(x)):
            return False
    return True
