"""Random numbers without state: the noise of a candidate depends on (seed, position, token id) and on nothing else.

So a request's tokens do not change with its batch, its rank or its device, and a replay continues as the first run
did. The mixing is splitmix64's finaliser (Steele, Lea and Flood 2014) in wrapping 64-bit integers; torch has no
unsigned ones, so shifts are masked.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

INCREMENT = 0x9E3779B97F4A7C15
FIRST_FACTOR = 0xBF58476D1CE4E5B9
SECOND_FACTOR = 0x94D049BB133111EB
UNIFORM_STEP = 2.0**-52


def row_keys(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """One 64-bit key per row, mixed from its seed and the position of the token to be sampled."""
    keys = _mix_rows(seeds + np.uint64(INCREMENT)) + positions.astype(np.uint64) * np.uint64(INCREMENT)
    return _mix_rows(keys).view(np.int64)


def gumbel(keys_B: Tensor, token_ids_BC: Tensor) -> Tensor:
    """Standard Gumbel noise in fp64; the argmax of log-probability plus it is a draw from the distribution."""
    hashed_BC = _mix(keys_B.unsqueeze(1) + token_ids_BC * signed(INCREMENT))
    uniform_BC = _logical_shift(hashed_BC, 12).to(torch.float64).add_(0.5).mul_(UNIFORM_STEP)
    return uniform_BC.log_().neg_().log_().neg_()


def _mix_rows(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(FIRST_FACTOR)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(SECOND_FACTOR)
    return x ^ (x >> np.uint64(31))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)) * signed(FIRST_FACTOR)
    x = (x ^ _logical_shift(x, 27)) * signed(SECOND_FACTOR)
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(value: int) -> int:
    """The same 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
