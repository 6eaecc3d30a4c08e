"""Memory that is there by address alone: a KV pool larger than the machine, of which what is written takes room."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

MAP_NORESERVE = 0x4000
"""From Linux' sys/mman.h."""


def sparse_zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reads as zeros; pages are there once they are written. Never write to all of it."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
