"""The ranks of one copy and what they say to each other. At size 1 every collective is a no-op.

Passed to whoever communicates; nobody else touches torch.distributed.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its stubs do not re-export it


class ParallelState:
    """This process's place among the ranks of a copy. `connect` or `single` make one; `close` ends it."""

    def __init__(self, rank: int, world_size: int, group: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group = group

    @classmethod
    def single(cls) -> ParallelState:
        """One rank alone."""
        return cls(0, 1, None)

    @classmethod
    def connect(
        cls, rank: int, world_size: int, store_host: str, store_port: int, device: str, timeout_s: float
    ) -> ParallelState:
        """Meet the other ranks at a TCPStore that someone else serves; every wait, later ones too, is bounded."""
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(store_host, store_port, world_size=None, is_master=False, timeout=timeout)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        return cls(rank, world_size, dist.group.WORLD)

    def close(self) -> None:
        """Leave the group; this object is of no use afterwards."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x, group=self._group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[world_size, *x.shape]: every rank's tensor, in rank order; all have one shape."""
        if self.world_size == 1:
            return x.unsqueeze(0)
        gathered = x.new_empty(self.world_size * x.numel())
        dist.all_gather_into_tensor(gathered, x.contiguous().view(-1), group=self._group)
        return gathered.view(self.world_size, *x.shape)

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values."""
        if self.world_size == 1:
            return value
        agreed = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._group)
        return int(agreed.item())
