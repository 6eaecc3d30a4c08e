"""Which cells and which engines are in memory at the same time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from bench.peers.cells import Cell
from bench.peers.registry import IN_PROCESS, MULL_GRPC, PEERS

MARGIN = 64
"""Tokens of a stream beside prompt and output: half a block, and the draft of a step."""
FEW_TOKENS = 2**13


class HasCell(Protocol):
    @property
    def cell(self) -> Cell: ...


Item = TypeVar("Item", bound=HasCell)


@dataclass(frozen=True)
class Room:
    """What engines are loaded for: enough for each of some cells."""

    kv_tokens: int
    max_model_len: int
    max_streams: int

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> Room:
        return cls(
            kv_tokens=max(map(_num_tokens, cells)),
            max_model_len=max(cell.length for cell in cells) + MARGIN,
            max_streams=max(cell.streams for cell in cells),
        )


@dataclass(frozen=True)
class Batch(Generic[Item]):
    """Cells that are measured without loading anew."""

    items: list[Item]

    @property
    def room(self) -> Room:
        return Room.of([item.cell for item in self.items])


def batches(items: Sequence[Item]) -> list[Batch[Item]]:
    """Cells of like need, the least first: those of short streams should not wait for room that only long ones want."""
    found: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        found[max(_num_tokens(item.cell), FEW_TOKENS).bit_length()].append(item)
    return [Batch(found[size]) for size in sorted(found)]


def _num_tokens(cell: Cell) -> int:
    return cell.streams * (cell.length + MARGIN)


def groups(needs_mb: Mapping[str, float], available_mb: float) -> list[list[str]]:
    """Engines that are loaded at the same time: ours in each group, so that every other is measured beside it.

    Our server comes last, beside ours alone: it cannot be stopped while others are measured, as Ray would take its
    processes for dead. Where two do not fit, each is alone; one that does not fit alone is in no group.
    """
    fitting = {name: need for name, need in needs_mb.items() if need <= available_mb}
    ours = [name for name in IN_PROCESS if name in fitting]
    left_mb = available_mb - sum(fitting[name] for name in ours)
    beside = {name: need for name, need in fitting.items() if name in PEERS and need <= left_mb}
    found = [[*ours, *peers] for peers in _packed(beside, left_mb)] or [ours] * bool(ours)
    found += [[name] for name in fitting if name in PEERS and name not in beside]
    if MULL_GRPC in fitting:
        found.append([*ours, MULL_GRPC] if fitting[MULL_GRPC] <= left_mb else [MULL_GRPC])
    return found


def _packed(needs_mb: Mapping[str, float], room_mb: float) -> list[list[str]]:
    """Each into the first group that has room for it."""
    found: list[list[str]] = []
    for name, need in needs_mb.items():
        for group in found:
            if sum(needs_mb[it] for it in group) + need <= room_mb:
                group.append(name)
                break
        else:
            found.append([name])
    return found
