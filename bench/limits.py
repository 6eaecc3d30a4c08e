"""What the machine itself can do, measured in the run whose figures are held against it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from workers.kernels.cpu import large_pages

READ_BYTES = 2**30
"""Far more than any cache holds; on large pages, as weights are."""
GEMM_SIZE = 2048


@dataclass(frozen=True)
class Limits:
    """The best of a few tries: what interrupts a try is not the machine's."""

    read_gb_per_s: float
    fp32_gflop_per_s: float

    @classmethod
    def measure(cls, threads: int, tries: int = 3) -> Limits:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        data = large_pages.zeros((READ_BYTES // 8,), torch.int64)
        a_NN = torch.rand(GEMM_SIZE, GEMM_SIZE)
        read_s = _best_s(data.sum, tries)
        gemm_s = _best_s(lambda: a_NN @ a_NN, tries)
        torch.set_num_threads(before)
        return cls(READ_BYTES / read_s / 1e9, 2 * GEMM_SIZE**3 / gemm_s / 1e9)


def _best_s(job: Callable[[], object], tries: int) -> float:
    times_s = []
    for _ in range(tries):
        start_s = time.perf_counter()
        job()
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)


if __name__ == "__main__":
    print(Limits.measure(torch.get_num_threads()))
