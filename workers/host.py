"""The machine that a rank runs on: whether others run on it, too, and what of its memory is this rank's part."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from workers.rank_group import RankGroup

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Differs from machine to machine, and is the same in all containers of one."""
HEX_DIGITS = 15
"""Of the id: as many as an int64 holds."""


@dataclass(frozen=True)
class HostMemoryShare:
    """Of the memory that is free on a host."""

    free_bytes: int
    num_ranks: int
    """Of the copy on this host, among which it is shared."""

    @property
    def bytes_per_rank(self) -> int:
        return self.free_bytes // self.num_ranks


def host_number() -> int:
    """Of this machine since it was started."""
    return int(BOOT_ID.read_text().replace("-", "")[:HEX_DIGITS], 16)


def shares_temporary_files(group: RankGroup, device: torch.device) -> bool:
    """Whether all ranks of the group are on one machine and see one directory there, which containers of it may not.

    All of them call this together.
    """
    return len({(number, directory) for number, directory in _told(group, device, _temporary_directory())}) == 1


def _temporary_directory() -> int:
    """What tells it from others of this machine."""
    status = Path(tempfile.gettempdir()).stat()
    told = hashlib.sha256(f"{status.st_dev} {status.st_ino}".encode()).hexdigest()
    return int(told[:HEX_DIGITS], 16)


def share_of_host_memory(world: RankGroup, device: torch.device) -> HostMemoryShare:
    """All ranks call this together, and allocate afterwards: until then each of them sees the same memory as free."""
    free_bytes = psutil.virtual_memory().available
    if world.size == 1:
        return HostMemoryShare(free_bytes, 1)
    told = _told(world, device, free_bytes)
    here = [free_bytes for number, free_bytes in told if number == host_number()]
    return HostMemoryShare(min(here), len(here))


def _told(group: RankGroup, device: torch.device, value: int) -> list[list[int]]:
    """Of each rank, its host's number and its value."""
    told: list[list[int]] = group.all_gather(torch.tensor([host_number(), value], device=device)).tolist()
    return told
