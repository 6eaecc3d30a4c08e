"""Values on their way between the host and a device, which neither of the two waits for.

A copy from memory that the device cannot reach by itself, or one that is asked for without `non_blocking`, would wait
until the device has done all that it was given: here every array is pinned first, and results come back into pinned
memory, behind an event. On a CPU there is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array on a device; on a CPU it shares the array's memory."""
    host = _reachable(values, device)
    return host if device.type == "cpu" else host.to(device, non_blocking=True)


def _reachable(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """In memory from which the device copies by itself; torch gives it to nobody else before the copy is made."""
    host = torch.from_numpy(values)
    return host.pin_memory() if device.type == "cuda" else host


class Arrival(Protocol):
    """A tensor on its way to the host."""

    def is_here(self) -> bool:
        """Never waits."""

    def values(self) -> list[Any]:
        """As `Tensor.tolist`. Waits for the device until they are here."""


class Here:
    """It was never away."""

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def is_here(self) -> bool:
        return True

    def values(self) -> list[Any]:
        return self._values


class Event(Protocol):
    """Of the device's queue: as torch.cuda.Event."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class UnderWay:
    """A copy into pinned memory that is in the device's queue, and an event behind it."""

    def __init__(self, source: Tensor, pinned: Tensor, event: Event) -> None:
        self._pinned, self._event = pinned, event
        pinned.copy_(source, non_blocking=True)
        event.record()

    def is_here(self) -> bool:
        return self._event.query()

    def values(self) -> list[Any]:
        self._event.synchronize()
        values: list[Any] = self._pinned.tolist()
        return values


Fetch = Callable[[Tensor], Arrival]
"""Sends a tensor to the host; one without elements tells how far the device is."""


def fetching_from(device: torch.device) -> Fetch:
    """How results come from a device."""
    if device.type == "cpu":
        return lambda tensor: Here(tensor.tolist())
    return lambda tensor: UnderWay(tensor, torch.empty_like(tensor, device="cpu", pin_memory=True), _event())


def _event() -> Event:
    """One that a waiting thread sleeps on would wake it too late."""
    event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own has no annotations
    return event


class Upload:
    """One array of the host, written anew for each step, and its twin on the device."""

    def __init__(self, num_rows: int, num_columns: int, device: torch.device) -> None:
        self.rows = torch.zeros(num_rows, num_columns, dtype=torch.int64, device=device)
        self._device = device

    def write(self, values: npt.NDArray[np.int64]) -> None:
        """Its first rows. What the device was given before has read the old ones by then: its queue is in order."""
        self.rows[: len(values)].copy_(_reachable(values, self._device), non_blocking=True)
