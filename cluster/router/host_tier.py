"""Blocks in the memory of the ranks' hosts: a second, larger place for KV that would otherwise be computed again.

Hop 5. Integers only: the ranks copy, in the order of their plans. What the prefix cache evicts is kept here under the
same name, so that a preempted sequence, or the next turn of a conversation, finds it behind what the device still has.
Knows nothing of sequences.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workers.step import HostMemory


@dataclass(frozen=True, kw_only=True)
class HostPlan:
    """How the host's memory is used by an attention group."""

    num_blocks: int
    least_blocks: int = 1
    """Fewer blocks of a sequence are computed again: that is as quick."""
    blocks_per_step: int = 1
    """Brought back beside one step, so that it takes hardly longer than the step does."""


def plan_host(memories: Sequence[HostMemory | None], block_size: int) -> HostPlan | None:
    """What the ranks' measurements make of their memory; None: there is none, or to compute again is cheaper.

    To keep a block costs a copy there and one back; to compute it, its tokens' share of steps. Whoever waits for copies
    waits for a step more. Attention behind a long prefix makes its tokens dearer than those that were measured: the
    estimate is on the side of those who wait for no copy.
    """
    known = [memory for memory in memories if memory is not None]
    if not known or len(known) < len(memories):
        return None
    copy_s = max(memory.copy_s for memory in known)
    step_s = max(memory.step_s for memory in known)
    gain_s = max(memory.token_s for memory in known) * block_size - 2 * copy_s
    num_blocks = min(memory.num_blocks for memory in known)
    if gain_s <= 0 or not num_blocks:
        return None
    return HostPlan(
        num_blocks=num_blocks,
        least_blocks=int(step_s / gain_s) + 1,
        blocks_per_step=max(1, int(step_s / copy_s)) if copy_s else num_blocks,
    )


def host_words(memories: Sequence[HostMemory | None], plan: HostPlan | None) -> str | None:
    """What to tell of it; None where nobody has such memory."""
    if plan is not None:
        return (
            f"host memory keeps {plan.num_blocks} KV blocks of each group, of sequences of {plan.least_blocks} or more"
        )
    known = next((memory for memory in memories if memory is not None), None)
    if known is None:
        return None
    return (
        f"host memory keeps no KV: a token takes {known.token_s * 1e3:.3g} ms to compute, to copy its block and back "
        f"{2 * known.copy_s * 1e3:.3g} ms; save the memory of engine.host_kv_bytes"
    )


class HostTier:
    """Who holds which block of the host, under which name. Only the copies of plans to be sent wait here."""

    def __init__(self, plan: HostPlan) -> None:
        self.plan = plan
        self._free = list(reversed(range(plan.num_blocks)))
        self._kept: OrderedDict[bytes, int] = OrderedDict()
        """Longest unused first."""
        self._num_readers: dict[int, int] = {}
        """Host blocks that are being brought back: nothing may be written over them before."""
        self._nameless: set[int] = set()
        """Of those, whose content nobody will ask for again."""
        self._worth_keeping: set[int] = set()
        """Device blocks of sequences that were long enough."""
        self._offloads: list[tuple[int, int]] = []

    @property
    def num_used(self) -> int:
        """Blocks whose content is known."""
        return self.plan.num_blocks - len(self._free)

    @property
    def num_reading(self) -> int:
        """Blocks that sequences wait for."""
        return len(self._num_readers)

    def given(self, block_ids: Sequence[int]) -> None:
        """Device blocks have a new user: what they held is gone."""
        self._worth_keeping.difference_update(block_ids)

    def was_used(self, block_ids: Sequence[int]) -> None:
        """A sequence with this table of device blocks has left."""
        if len(block_ids) >= self.plan.least_blocks:
            self._worth_keeping.update(block_ids)

    def keep(self, block_id: int, block_hash: bytes) -> None:
        """A device block is about to be written over: copy it in the next plan, unless that does not pay."""
        is_worth = block_id in self._worth_keeping
        self._worth_keeping.discard(block_id)
        if block_hash in self._kept:
            self._kept.move_to_end(block_hash)
        elif is_worth and (host_id := self._take()) is not None:
            self._kept[block_hash] = host_id
            self._offloads.append((block_id, host_id))

    def find(self, hashes: Sequence[bytes]) -> int:
        """How many blocks from the start of this chain are here; 0 where they are too few to pay."""
        count = next((i for i, block_hash in enumerate(hashes) if block_hash not in self._kept), len(hashes))
        return count if count >= self.plan.least_blocks else 0

    def read(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of these names, which stay as they are until `let_go`."""
        host_ids = []
        for block_hash in hashes:
            host_id = self._kept[block_hash]
            self._kept.move_to_end(block_hash)
            self._num_readers[host_id] = self._num_readers.get(host_id, 0) + 1
            host_ids.append(host_id)
        return host_ids

    def let_go(self, host_ids: Iterable[int]) -> None:
        """The plan that brings them back has all its evictions, or who waited for them has gone."""
        for host_id in host_ids:
            self._num_readers[host_id] -= 1
            if not self._num_readers[host_id]:
                self._end_reading(host_id)

    def forget(self, hashes: Sequence[bytes]) -> None:
        """Nobody will ask for these again."""
        for block_hash in hashes:
            host_id = self._kept.pop(block_hash, None)
            if host_id is None:
                continue
            if host_id in self._num_readers:
                self._nameless.add(host_id)
            else:
                self._free.append(host_id)

    def take_offloads(self) -> list[tuple[int, int]]:
        """What the plan that is now sent must copy first: (device block, host block)."""
        last = {host_id: block_id for block_id, host_id in self._offloads}
        self._offloads = []
        return [(block_id, host_id) for host_id, block_id in last.items()]

    def _take(self) -> int | None:
        """A block to write to. None: all are being read."""
        if self._free:
            return self._free.pop()
        oldest = next((name for name, host_id in self._kept.items() if host_id not in self._num_readers), None)
        return None if oldest is None else self._kept.pop(oldest)

    def _end_reading(self, host_id: int) -> None:
        del self._num_readers[host_id]
        if host_id in self._nameless:
            self._nameless.remove(host_id)
            self._free.append(host_id)
