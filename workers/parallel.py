"""This process's place among the ranks of a copy: which groups it is in, and how they meet.

Passed to whoever communicates. Every wait is bounded by the timeout given when the ranks met, and ends in an error.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its stubs do not re-export it

from workers.host_group import share_memory
from workers.layout import ParallelLayout
from workers.rank_group import RankGroup
from workers.symmetric_group import share_symmetric_memory

NCCL_ERRORS = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
"""A lost connection or a late rank shall neither end this process, with the weights that it could keep, nor abort the
collectives, behind which it would compute on garbage and answer. It waits: the Router names the rank that the others
wait for, and has them abort."""


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
        cls,
        rank: int,
        layout: ParallelLayout,
        store_host: str,
        store_port: int,
        device: str,
        timeout_s: float,
        *,
        symmetric_memory: bool = True,
        is_first_group: bool = True,
    ) -> ParallelState:
        """Meet the other ranks at a TCPStore that someone else serves; every wait, later ones too, is bounded.

        `symmetric_memory`: GPUs of one host may sum by reading each other's memory. Not where one of them was in a
        group before: torch knows where they meet by the group's name, which is the same again.
        """
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(store_host, store_port, world_size=None, is_master=False, timeout=timeout)
        backend = "nccl" if device == "cuda" else "gloo"
        os.environ.setdefault(*NCCL_ERRORS)
        size = layout.world_size
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        world = RankGroup(rank, size, dist.group.WORLD)
        if device == "cpu" and size > 1:
            world = share_memory(world, timeout_s)
        tp = _attention_group(rank, layout, world, timeout)
        if device == "cuda" and symmetric_memory:
            cuda = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(cuda)
            # Where groups are several, sums of all ranks are of rows on their way to experts: few, and large.
            if tp.minimum(int(is_first_group), cuda):
                tp = share_symmetric_memory(tp, cuda)
            world = tp if layout.dp == 1 else world
        return cls(rank, layout, world, tp)

    def regrouped(self, layout: ParallelLayout, timeout_s: float) -> ParallelState:
        """The same ranks in other groups; all of them call this together."""
        tp = _attention_group(self.rank, layout, self.world, timedelta(seconds=timeout_s))
        return ParallelState(self.rank, layout, self.world, tp)

    @property
    def groups(self) -> list[RankGroup]:
        """Each once."""
        return [self.world] if self.tp is self.world else [self.world, self.tp]

    @property
    def num_group_exchanges(self) -> int:
        """Collectives that this rank has begun with its attention group alone; 0 where that is all ranks."""
        return 0 if self.tp is self.world else self.tp.num_exchanges

    @property
    def num_sent_bytes(self) -> int:
        """To other ranks, so far."""
        return sum(group.num_sent_bytes for group in self.groups)

    def abort(self) -> None:
        """From another thread: whoever waits for other ranks waits no longer. Only `close` may follow.

        All groups at once: NCCL comes back from one only when no recording has it any more, and who waits in the other
        would not drop its recordings before.
        """
        aborts = [threading.Thread(target=group.abort, name="abort", daemon=True) for group in self.groups]
        for thread in aborts:
            thread.start()
        for thread in aborts:
            thread.join()

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
    group = RankGroup(rank % layout.tp, layout.tp, groups[rank // layout.tp])
    return share_memory(group, timeout.total_seconds()) if dist.get_backend() == "gloo" else group
