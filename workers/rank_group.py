"""Ranks that communicate. At size 1 every collective is a no-op.

Nobody else calls torch.distributed but for `parallel`, which makes the groups. Every wait is bounded by the timeout
given when the ranks met, and ends in an error. W ranks of a group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from workers.kernels.ordered_sum import sum_in_order

ONE_ROUND_BYTES = 64 * 2**10
"""Up to this size a sum takes one round of messages, in which every rank gets all of every other's tensor."""


class RankGroup:
    """Ranks that communicate, in a fixed order: all of a copy, or those of one attention group."""

    def __init__(self, index: int, size: int, group: dist.ProcessGroup | None) -> None:
        self.index = index
        """This process's place in the group."""
        self.size = size
        self.process_group = group
        self.num_exchanges = 0
        """Begun so far."""
        self.num_sent_bytes = 0
        """To other ranks of the group, so far; through shared memory what they read of ours."""

    @classmethod
    def alone(cls) -> RankGroup:
        return cls(0, 1, None)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place, added in rank order: the bits depend on no size, topology or library.

        Of two there is but one order. Of more, small tensors are gathered and added; of larger ones each rank adds a
        part, and the sums are gathered, which moves no more bytes than a ring does.
        """
        if self.size == 1 or not x.numel():
            return x
        self.num_exchanges += 1
        if self.size == 2:
            self.num_sent_bytes += x.nbytes
            dist.all_reduce(x, group=self.process_group)
            return x
        if x.nbytes <= ONE_ROUND_BYTES:
            parts = self.all_gather(x)
            return sum_in_order(parts, x) if x.is_contiguous() else x.copy_(sum_in_order(parts))
        flat_n, num_missing = x.reshape(-1), -x.numel() % self.size
        if num_missing:  # without any, padding would still copy
            flat_n = torch.nn.functional.pad(flat_n, (0, num_missing))
        mine_n = sum_in_order(self.all_to_all(flat_n.view(self.size, -1), [1] * self.size, [1] * self.size))
        return x.copy_(self.all_gather(mine_n).view(-1)[: x.numel()].view(x.shape))

    def all_gather(self, x: Tensor) -> Tensor:
        """[W, *x.shape]: every rank's tensor, in rank order; all have one shape."""
        if self.size == 1:
            return x.unsqueeze(0)
        self.num_exchanges += 1
        self.num_sent_bytes += x.nbytes * (self.size - 1)
        gathered = x.new_empty(self.size * x.numel())
        dist.all_gather_single(gathered, x.contiguous().view(-1), group=self.process_group)
        return gathered.view(self.size, *x.shape)

    def all_to_all(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """The next send_counts[w] rows go to rank w. Returns receive_counts[w] rows of each rank w, in rank order."""
        if self.size == 1:
            return rows
        self.num_exchanges += 1
        self._count_rows(rows, send_counts)
        received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), receive_counts, send_counts, group=self.process_group)
        return received

    def _count_rows(self, rows: Tensor, send_counts: list[int]) -> None:
        """Those that leave this rank."""
        num_leaving = len(rows) - send_counts[self.index]
        if num_leaving:
            self.num_sent_bytes += rows.nbytes // len(rows) * num_leaving

    def abort(self) -> None:
        """From another thread: a wait for other ranks ends, with an error. Sockets end theirs as their peers close."""
        if self.process_group is not None and dist.get_backend(self.process_group) == "nccl":
            self.process_group.abort()

    def minimum(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values."""
        if self.size == 1:
            return value
        self.num_exchanges += 1
        agreed = torch.tensor([value], dtype=torch.int64, device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self.process_group)
        return int(agreed.item())
