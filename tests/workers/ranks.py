"""Real rank processes over gloo: started once, they run the jobs they are sent."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore

from tests.processes import fork_server
from workers.layout import ParallelLayout
from workers.parallel import ParallelState

TIMEOUT_S = 60.0


class RankProcesses:
    """`world_size` processes that have met; `run` gives each the same job and returns one answer per rank."""

    def __init__(self, world_size: int) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = fork_server()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, world_size, self.store.port, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """job(parallel, *arguments) on every rank."""
        for pipe in self.pipes:
            pipe.send((job, arguments))
        answers = [self._receive(rank, pipe) for rank, pipe in enumerate(self.pipes)]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()

    def _receive(self, rank: int, pipe: Connection) -> Any:
        if not pipe.poll(TIMEOUT_S):
            raise TimeoutError(f"rank {rank} did not answer within {TIMEOUT_S} s")
        return pipe.recv()


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    parallel = ParallelState.connect(rank, ParallelLayout(tp=world_size), "127.0.0.1", port, "cpu", TIMEOUT_S)
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            pipe.send(function(parallel, *arguments))
        except Exception as error:
            pipe.send(error)
    parallel.close()
