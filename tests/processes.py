"""Processes of a test's own: each is forked from one that has imported torch, which takes seconds, and done no more."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess

import msgspec

from cluster.router.gather import RankEnd
from cluster.router.launchers import end_of
from workers.shard import RunnerFactory, ShardConfig, load_runner, main

_IMPORTED_ONCE = ["pytest", "hypothesis", "tests.workers.ranks", "workers.runner"]


def fork_server() -> ForkServerContext:
    """One for all tests of this process; each process that it starts is as fresh as a spawned one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    return context


class ForkLauncher:
    """Ranks as `ProcessLauncher` starts them, but from the fork server: each is there at once."""

    host: str | None = None
    settle_s = 0.2

    def __init__(self, build_runner: RunnerFactory = load_runner) -> None:
        """`build_runner`: a function of a module, which the fork server finds by its name."""
        self._build_runner = build_runner

    async def launch(self, config: ShardConfig) -> ForkedRank:
        theirs, ours = multiprocessing.Pipe(duplex=False)
        process = fork_server().Process(target=_run_rank, args=(theirs, self._build_runner), daemon=True)
        process.start()
        theirs.close()
        rank = ForkedRank(config.runner.rank, process, ours)
        await rank.restart(config)
        return rank


class ForkedRank:
    """Its stdin stays open as long as this lives: the rank ends when it closes."""

    def __init__(self, rank: int, process: BaseProcess, stdin: Connection) -> None:
        self.rank = rank
        self._process = process
        self._stdin = stdin

    async def restart(self, config: ShardConfig) -> None:
        os.write(self._stdin.fileno(), msgspec.json.encode(config) + b"\n")

    async def wait(self) -> RankEnd:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._process.sentinel)
        self._process.join()
        assert self._process.exitcode is not None
        return end_of(self._process.exitcode)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _run_rank(stdin: Connection, build_runner: RunnerFactory) -> None:
    os.dup2(stdin.fileno(), 0)
    sys.exit(main(build_runner))
