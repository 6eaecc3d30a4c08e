"""Ranks on one host: collectives through shared memory instead of sockets, on a CPU.

A decode step of a small model has several sums of a kilobyte; each is a few microseconds here and about a millisecond
over gloo. The bits are the same: both add in rank order. The memory is a file in /dev/shm that loses its name as soon
as all have opened it, so no end of a process leaves it behind. W ranks of a group.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import uuid
from pathlib import Path

import torch
from torch import Tensor

from workers.errors import PeerLate
from workers.kernels.cpu.library import native
from workers.rank_group import RankGroup

log = logging.getLogger(__name__)

SHARED_DIR = Path("/dev/shm")
HALF_BYTES = 512 * 2**10
"""Of a rank's mailbox; larger tensors go in parts."""
COUNTER_BYTES = 64


class _Channel(ctypes.Structure):
    """`HostGroup` of kernels/cpu/native/host_group.cpp."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("half_bytes", ctypes.c_int64),
        ("timeout_ns", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("posts", ctypes.c_uint32),
    )


class HostGroup(RankGroup):
    """A group whose ranks share memory; what it has no faster way for goes the way of any group."""

    def __init__(self, group: RankGroup, memory: mmap.mmap, library: ctypes.CDLL, timeout_s: float) -> None:
        super().__init__(group.index, group.size, group.process_group)
        self._memory, self._library, self._timeout_s = memory, library, timeout_s
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._channel = _Channel(address, HALF_BYTES, int(timeout_s * 1e9), group.index, group.size, 0)
        self._address = ctypes.addressof(self._channel)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place. Raises PeerLate naming the rank that did not come in time."""
        if x.dtype != torch.float32 or not x.is_contiguous():
            return super().all_reduce(x)
        self.num_exchanges += 1
        self.num_sent_bytes += 2 * x.nbytes * (self.size - 1) // self.size
        self._check(self._library.mull_host_all_reduce(self._address, x.data_ptr(), x.numel()))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[W, *x.shape], in rank order. Raises PeerLate naming the rank that did not come in time."""
        self.num_exchanges += 1
        self.num_sent_bytes += x.nbytes * (self.size - 1)
        x = x.contiguous()
        gathered = x.new_empty(self.size, *x.shape)
        self._check(self._library.mull_host_all_gather(self._address, x.data_ptr(), x.nbytes, gathered.data_ptr()))
        return gathered

    def all_to_all(self, rows: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
        """As in any group. Raises PeerLate naming the rank that did not come in time."""
        self.num_exchanges += 1
        self._count_rows(rows, send_counts)
        rows = rows.contiguous()
        received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
        row_bytes = rows[:1].nbytes if len(rows) else received[:1].nbytes
        sizes = [torch.tensor(counts, dtype=torch.int64) * row_bytes for counts in (send_counts, receive_counts)]
        addresses = [tensor.data_ptr() for tensor in (rows, *sizes, received)]
        self._check(self._library.mull_host_all_to_all(self._address, *addresses))
        return received

    def abort(self) -> None:
        """From another thread: a wait for other ranks ends now, as if they were late."""
        self._channel.timeout_ns = 0

    def _check(self, late: int) -> None:
        if late >= 0:
            raise PeerLate(
                f"the rank at place {late} of this group of {self.size} was not heard of for {self._timeout_s:g} s"
            )


def share_memory(group: RankGroup, timeout_s: float) -> RankGroup:
    """The same group through shared memory where all its ranks are on one host; all of them call this together."""
    library = native()
    name = _agreed_name(group)
    memory = None if library is None else _open(SHARED_DIR / name, group)
    is_shared = group.minimum(int(memory is not None), torch.device("cpu"))
    if group.index == 0:
        (SHARED_DIR / name).unlink(missing_ok=True)
    if library is None or memory is None or not is_shared:
        log.info("%d ranks talk over sockets: they do not all share %s", group.size, SHARED_DIR)
        return group
    return HostGroup(group, memory, library, timeout_s)


def _agreed_name(group: RankGroup) -> str:
    """Drawn by the first rank, heard by all."""
    drawn = torch.frombuffer(bytearray(uuid.uuid4().bytes), dtype=torch.uint8)
    return f"mull-{bytes(group.all_gather(drawn)[0].tolist()).hex()}"


def _open(file: Path, group: RankGroup) -> mmap.mmap | None:
    """Made by the first rank before the others look for it. None where it cannot be had: another host, or no room."""
    size = group.size * (COUNTER_BYTES + 2 * HALF_BYTES)
    memory = None
    if group.index == 0:
        memory = _map(file, size, os.O_CREAT | os.O_EXCL)
    group.minimum(0, torch.device("cpu"))
    return memory if group.index == 0 else _map(file, size, 0)


def _map(file: Path, size: int, flags: int) -> mmap.mmap | None:
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC | flags, mode=0o600)
        try:
            if flags:
                os.posix_fallocate(descriptor, 0, size)  # no room shows here, not as a SIGBUS later
            return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        log.info("no shared memory at %s: %s", file, error.strerror)
        return None
