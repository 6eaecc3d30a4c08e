"""What each slot of a rank holds, in integers: its blocks and how far its sequence has been computed.

Hop 7's first half: a plan's deltas are applied here and checked against the contract. Knows no tensors or weights.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.errors import PlanError
from workers.step import Draft, OpenSlot, Prefill

Ints = npt.NDArray[np.int64]


class SlotStates:
    """Per slot: its blocks and how many of its positions hold KV. The runner's only writer of them."""

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, num_blocks: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.max_model_len = max_model_len
        self.blocks: Ints = np.zeros((num_slots, -(-max_model_len // block_size)), dtype=np.int64)
        self.num_slot_blocks = [0] * num_slots
        self.num_computed: Ints = np.zeros(num_slots, dtype=np.int64)
        self.is_open = [False] * num_slots
        self.has_token = [False] * num_slots
        """The slot sampled a token that no forward pass has taken in yet."""

    def close(self, slot: int) -> None:
        self._check_open(slot, "close")
        self.is_open[slot] = False

    def open(self, opened: OpenSlot) -> None:
        slot = opened.slot
        self._check_number(slot, "open")
        if self.is_open[slot]:
            raise PlanError(f"open: slot {slot} is already open; close it first")
        self.is_open[slot], self.has_token[slot], self.num_slot_blocks[slot] = True, False, 0
        self.num_computed[slot] = opened.num_cached
        self.extend(slot, opened.block_ids)
        capacity = self.num_slot_blocks[slot] * self.block_size
        if not 0 <= opened.num_cached <= capacity:
            raise PlanError(f"open: slot {slot} claims {opened.num_cached} cached tokens, its blocks hold {capacity}")

    def extend(self, slot: int, block_ids: list[int]) -> None:
        self._check_open(slot, "extend")
        first = self.num_slot_blocks[slot]
        stop, limit = first + len(block_ids), self.blocks.shape[1]
        if stop > limit:
            raise PlanError(
                f"extend: slot {slot} would have {stop} blocks, {limit} cover the context of {self.max_model_len}"
            )
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            raise PlanError(f"extend: slot {slot} gets a block outside [0, {self.num_blocks}): {block_ids}")
        self.blocks[slot, first:stop] = block_ids
        self.num_slot_blocks[slot] = stop

    def start_prefill(self, prefill: Prefill) -> None:
        """Take note of a chunk about to be computed."""
        slot, count = prefill.slot, len(prefill.token_ids)
        self._check_open(slot, "prefill")
        computed = int(self.num_computed[slot])
        if count == 0 or prefill.start != computed:
            raise PlanError(
                f"prefill: slot {slot} starts {count} tokens at {prefill.start}, its next position is {computed}"
            )
        if prefill.score is not None and not 0 < len(prefill.score.target_ids) <= count:
            raise PlanError(f"prefill: slot {slot} scores {len(prefill.score.target_ids)} of {count} rows")
        self._advance(slot, count, "prefill")
        self.has_token[slot] = prefill.sample

    def start_decode(self, slot: int) -> None:
        """Take note of a decode about to be computed."""
        self._check_open(slot, "decode")
        if not self.has_token[slot]:
            raise PlanError(f"decode: slot {slot} has no sampled token to go on from; prefill it with sample first")
        self._advance(slot, 1, "decode")

    def start_draft(self, draft: Draft) -> None:
        """Take note of guesses about to be computed behind a decode of this step."""
        if not draft.token_ids:
            raise PlanError(f"draft: slot {draft.slot} is given no tokens")
        self._advance(draft.slot, len(draft.token_ids), "draft")

    def take_back(self, slot: int, count: int) -> None:
        """The last so many positions hold wrong guesses, to be written again."""
        self.num_computed[slot] -= count

    def cells(self, slots: Ints, positions: Ints) -> Ints:
        """Where the KV of positions lies in the pool: block_id * block_size + offset."""
        block_ids = self.blocks[slots, positions // self.block_size]
        return block_ids * self.block_size + positions % self.block_size

    def _advance(self, slot: int, count: int, what: str) -> None:
        end, capacity = int(self.num_computed[slot]) + count, self.num_slot_blocks[slot] * self.block_size
        if end > min(capacity, self.max_model_len):
            raise PlanError(
                f"{what}: slot {slot} needs {end} positions, blocks hold {capacity}, the context {self.max_model_len}"
            )
        self.num_computed[slot] = end

    def _check_number(self, slot: int, what: str) -> None:
        if not 0 <= slot < len(self.is_open):
            raise PlanError(f"{what}: slot {slot} is outside [0, {len(self.is_open)})")

    def _check_open(self, slot: int, what: str) -> None:
        self._check_number(slot, what)
        if not self.is_open[slot]:
            raise PlanError(f"{what}: slot {slot} is not open")
