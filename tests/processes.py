"""Processes of a test's own: each is forked from one that has imported torch, which takes seconds, and done no more."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_IMPORTED_ONCE = ["pytest", "hypothesis", "tests.workers.ranks", "workers.runner"]


def fork_server() -> ForkServerContext:
    """One for all tests of this process; each process that it starts is as fresh as a spawned one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    return context
