"""Ranks of one copy as local processes, for benchmarks: each runs one job, and its answer comes back."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore

from workers.config import ParallelLayout
from workers.parallel import ParallelState

TIMEOUT_S = 900.0


def on_ranks(layout: ParallelLayout, job: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """job(parallel, *arguments[rank]) in a process of one thread for each rank; every wait is bounded."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(layout.world_size):
        ours, theirs = context.Pipe()
        start = (rank, layout, store.port, theirs, job, arguments[rank])
        processes.append(context.Process(target=_run, args=start, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    answers = [_answer(rank, pipe) for rank, pipe in enumerate(pipes)]
    for process in processes:
        process.join(TIMEOUT_S)
    return answers


def _run(
    rank: int, layout: ParallelLayout, port: int, pipe: Connection, job: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    parallel = ParallelState.connect(rank, layout, "127.0.0.1", port, "cpu", TIMEOUT_S)
    pipe.send(job(parallel, *arguments))
    parallel.close()


def _answer(rank: int, pipe: Connection) -> Any:
    """Raises EOFError where the rank ended without one: its own error is on stderr."""
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_S:g} s")
    return pipe.recv()
