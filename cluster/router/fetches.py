"""What a step brings back from the memory of the ranks' hosts, beside what it computes.

Hop 5, a part of the scheduler: `slots.py` books it, `host_tier.py` knows where blocks lie.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.router.host_tier import HostTier
from cluster.router.sequence import Sequence
from cluster.router.slots import SlotTable
from cluster.router.step_builder import StepBuilder

Reopen = Callable[[Sequence, StepBuilder], bool]
"""Tells the ranks of a sequence's forced tokens; False: there are no blocks for them."""


def add_fetches(step: StepBuilder, slots: SlotTable, host: HostTier, reopen: Reopen) -> None:
    """As many blocks as a step has room for: who needs them is computed in a later one.

    Where there is nothing else to compute, all of the first in order is brought back, and it is computed at once.
    """
    if not host.num_reading:
        return
    waiting = [seq for seq in slots.ranked if seq.fetches]
    if step.is_empty and step.can_prefill and (not waiting[0].must_reopen or reopen(waiting[0], step)):
        step.fetched += slots.fetch(waiting[0], len(waiting[0].fetches))
        step.prefill(waiting[0])
    if step.is_empty:
        return
    for seq in waiting:
        if (room := host.plan.blocks_per_step - len(step.fetched)) <= 0:
            break
        step.fetched += slots.fetch(seq, room)
