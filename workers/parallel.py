"""The ranks of one copy and what they say to each other. At size 1 every collective is a no-op.

Passed to whoever communicates; nobody else touches torch.distributed. Every wait is bounded by the timeout given when
the ranks met, and ends in an error of torch.distributed. W ranks of a group.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its stubs do not re-export it

from workers.layout import ParallelLayout

ONE_ROUND_BYTES = 64 * 2**10
"""Up to this size a sum takes one round of messages, in which every rank gets all of every other's tensor."""


class RankGroup:
    """Ranks that communicate, in a fixed order: all of a copy, or those of one attention group."""

    def __init__(self, index: int, size: int, group: dist.ProcessGroup | None) -> None:
        self.index = index
        """This process's place in the group."""
        self.size = size
        self._group = group

    @classmethod
    def alone(cls) -> RankGroup:
        return cls(0, 1, None)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place, added in rank order: the bits depend on no size, topology or library.

        Small tensors and pairs of ranks gather and add; others scatter parts, add, and gather the sums, which moves no
        more bytes than a ring does.
        """
        if self.size == 1 or not x.numel():
            return x
        if self.size == 2 or x.nbytes <= ONE_ROUND_BYTES:
            return x.copy_(sum_in_order(self.all_gather(x)))
        width = -(-x.numel() // self.size)
        parts_Wn = torch.nn.functional.pad(x.reshape(-1), (0, self.size * width - x.numel())).view(self.size, width)
        mine_n = sum_in_order(self.all_to_all(parts_Wn, [1] * self.size, [1] * self.size))
        return x.copy_(self.all_gather(mine_n).view(-1)[: x.numel()].view(x.shape))

    def all_gather(self, x: Tensor) -> Tensor:
        """[W, *x.shape]: every rank's tensor, in rank order; all have one shape."""
        if self.size == 1:
            return x.unsqueeze(0)
        gathered = x.new_empty(self.size * x.numel())
        dist.all_gather_into_tensor(gathered, x.contiguous().view(-1), group=self._group)
        return gathered.view(self.size, *x.shape)

    def all_to_all(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """The next send_counts[w] rows go to rank w. Returns receive_counts[w] rows of each rank w, in rank order."""
        if self.size == 1:
            return rows
        received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive_counts, send_counts, group=self._group)
        return received

    def exchange_counts(self, send_counts_W: Tensor) -> list[int]:
        """What each rank will send to this one: send_counts_W[w] is what this one will send to rank w."""
        return [int(n) for n in self.all_to_all(send_counts_W, [1] * self.size, [1] * self.size).tolist()]

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values."""
        if self.size == 1:
            return value
        agreed = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._group)
        return int(agreed.item())


def sum_in_order(parts: Tensor) -> Tensor:
    """Sum over dim 0, one after another: torch's own sum may pair them otherwise."""
    *_, total = accumulate(parts.unbind(), torch.add)
    return total


class ParallelState:
    """This process's place among the ranks of a copy. `connect` or `single` make one; `close` ends it."""

    def __init__(self, rank: int, layout: ParallelLayout, world: RankGroup, tp: RankGroup) -> None:
        self.rank = rank
        self.layout = layout
        self.world = world
        """All ranks of the copy: experts are spread over them."""
        self.tp = tp
        """The ranks of this one's attention group."""

    @property
    def world_size(self) -> int:
        return self.world.size

    @classmethod
    def single(cls) -> ParallelState:
        """One rank alone."""
        return cls(0, ParallelLayout(), RankGroup.alone(), RankGroup.alone())

    @classmethod
    def connect(
        cls, rank: int, layout: ParallelLayout, store_host: str, store_port: int, device: str, timeout_s: float
    ) -> ParallelState:
        """Meet the other ranks at a TCPStore that someone else serves; every wait, later ones too, is bounded."""
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(store_host, store_port, world_size=None, is_master=False, timeout=timeout)
        backend = "nccl" if device == "cuda" else "gloo"
        size = layout.world_size
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        world = RankGroup(rank, size, dist.group.WORLD)
        return cls(rank, layout, world, _attention_group(rank, layout, world, timeout))

    def regrouped(self, layout: ParallelLayout, timeout_s: float) -> ParallelState:
        """The same ranks in other groups; all of them call this together."""
        tp = _attention_group(self.rank, layout, self.world, timedelta(seconds=timeout_s))
        return ParallelState(self.rank, layout, self.world, tp)

    def close(self) -> None:
        """Leave the groups; this object is of no use afterwards."""
        if self.world.size > 1:
            dist.destroy_process_group()


def _attention_group(rank: int, layout: ParallelLayout, world: RankGroup, timeout: timedelta) -> RankGroup:
    """Every rank has to take part in making every group, also of those that it is not in."""
    if layout.dp == 1:
        return world
    if layout.tp == 1:
        return RankGroup.alone()
    starts = range(0, layout.world_size, layout.tp)
    groups = [dist.new_group(list(range(start, start + layout.tp)), timeout=timeout) for start in starts]
    return RankGroup(rank % layout.tp, layout.tp, groups[rank // layout.tp])
