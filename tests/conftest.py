"""For all tests: long files first, one thread for torch, and no property test asserts how long an example takes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from multiprocessing import forkserver

import pytest
from hypothesis import settings

from cluster.ports import HeldPorts

# Torch's threads wait for one another in loops. Where several processes share the cores, those loops are most of what
# is computed. Read when torch is imported; a test or a server that sets its threads itself has them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when triton is imported: its kernels run without a GPU. On a machine that has one, TRITON_INTERPRET=0 compiles
# them for it.
os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("mull", deadline=None)
settings.load_profile("mull")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that may take long come first, so that the processes of a parallel run end together."""
    items.sort(key=_longest_s, reverse=True)


def _longest_s(item: pytest.Item) -> float:
    """The timeout that its whole file has; 0 where it has none of its own."""
    module = item.getparent(pytest.Module)
    marker = module.get_closest_marker("timeout") if module is not None else None
    return 0.0 if marker is None else float(marker.args[0])


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Whatever was drawn before: a test's tensors do not depend on which tests came before it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture
def held_ports() -> Iterator[HeldPorts]:
    """Ports that nobody else gets while a test opens, closes and opens its servers on them."""
    with HeldPorts() as ports:
        yield ports


def pytest_unconfigure() -> None:
    """The fork server, where one was needed, ends before this process does: nothing is left when the tests are over."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # Python has no public way to wait for it
