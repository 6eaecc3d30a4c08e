"""How many copies there should be, from how full those that run are: of sequences, and of KV.

Serve asks in its controller, and does what is answered when it has been the answer for long enough. Pure, and without
imports of ours: Serve sends this module there by value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

SLOTS_USED = "slots_used"
"""Running and waiting sequences of a copy over its slots; above 1 where it cannot run all of them."""
KV_USED = "kv_used"
"""Share of its KV blocks in use."""
HIGH, LOW = 0.8, 0.5
"""How full copies may be: with fewer than HIGH asks for they would be fuller; with fewer than LOW allows they might be
soon. What lies between changes nothing."""


def wanted_copies(fullness: Sequence[float], num_copies: int) -> int:
    """The number of copies for what is asked of those that have said how full they are; those that load have not."""
    if not fullness:
        return num_copies  # all of them load, or are recovering
    load = sum(fullness)
    at_least, at_most = math.ceil(load / HIGH), max(1, math.ceil(load / LOW))
    return at_least if at_least > num_copies else min(num_copies, at_most)


def scale_copies(context: Any) -> tuple[int, dict[str, Any]]:
    """Serve's hook: its AutoscalingContext in, (number of replicas, state to keep) out. Serve bounds the number."""
    said = context.aggregated_metrics or {}
    slots, kv = said.get(SLOTS_USED, {}), said.get(KV_USED, {})
    fullness = [max(used, kv.get(replica, 0.0)) for replica, used in slots.items()]
    return wanted_copies(fullness, context.target_num_replicas), {}
