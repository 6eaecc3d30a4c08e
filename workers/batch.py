"""One step's inputs as tensors, built from the slots' integers: prefill chunks first, then one token per decoding slot.

Hop 7's first half: `SlotTable` applies a plan's deltas and checks it against the contract; `ForwardBatch` is what
the layers read. Knows nothing of weights. T tokens, B decoding sequences, C tokens of a chunk, S keys, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.config import ModelConfig
from workers.errors import PlanError
from workers.step import OpenSlot, Prefill, StepPlan

Ints = npt.NDArray[np.int64]


class SlotTable:
    """Per slot: its blocks and how many of its positions hold KV. The runner's only writer of them."""

    def __init__(self, num_slots: int, max_model_len: int, block_size: int, num_blocks: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.max_model_len = max_model_len
        self.blocks: Ints = np.zeros((num_slots, -(-max_model_len // block_size)), dtype=np.int64)
        self.num_slot_blocks: Ints = np.zeros(num_slots, dtype=np.int64)
        self.num_computed: Ints = np.zeros(num_slots, dtype=np.int64)
        self.is_open = np.zeros(num_slots, dtype=np.bool_)
        self.has_token = np.zeros(num_slots, dtype=np.bool_)
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
        capacity = int(self.num_slot_blocks[slot]) * self.block_size
        if not 0 <= opened.num_cached <= capacity:
            raise PlanError(f"open: slot {slot} claims {opened.num_cached} cached tokens, its blocks hold {capacity}")

    def extend(self, slot: int, block_ids: list[int]) -> None:
        self._check_open(slot, "extend")
        first = int(self.num_slot_blocks[slot])
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
        self._advance(slot, count, "prefill")
        self.has_token[slot] = prefill.sample

    def start_decode(self, slot: int) -> None:
        """Take note of a decode about to be computed."""
        self._check_open(slot, "decode")
        if not self.has_token[slot]:
            raise PlanError(f"decode: slot {slot} has no sampled token to go on from; prefill it with sample first")
        self._advance(slot, 1, "decode")

    def cells(self, slots: Ints, positions: Ints) -> Ints:
        """Where the KV of positions lies in the pool: block_id * block_size + offset."""
        block_ids = self.blocks[slots, positions // self.block_size]
        return block_ids * self.block_size + positions % self.block_size

    def _advance(self, slot: int, count: int, what: str) -> None:
        end, capacity = int(self.num_computed[slot]) + count, int(self.num_slot_blocks[slot]) * self.block_size
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


@dataclass(frozen=True, kw_only=True)
class PrefillChunk:
    """One sequence's chunk: rows [first, first + size) of the batch."""

    first: int
    size: int
    num_keys: int
    block_ids: Tensor
    mask_CS: Tensor | None
    """None where the chunk starts its sequence."""


@dataclass(frozen=True, kw_only=True)
class DecodeGroup:
    """Decoding rows [first, first + size) of the batch, of similar length."""

    first: int
    size: int
    block_ids: Tensor
    mask_B11S: Tensor


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """What one forward pass reads. Rows are tokens: all chunks, then all decodes."""

    token_ids_T: Tensor
    cos_T1D: Tensor
    signed_sin_T1D: Tensor
    cells_T: Tensor
    chunks: list[PrefillChunk]
    decodes: list[DecodeGroup]
    sample_rows_B: Tensor
    """Rows whose logits give a token, in the order of `StepPlan.sampling_slots`."""
    sample_slots: Ints
    sample_positions: Ints
    """Of the tokens to be sampled."""


class BatchBuilder:
    """Turns a plan into a ForwardBatch on one device."""

    def __init__(self, table: SlotTable, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.table, self.device, self.dtype = table, device, dtype
        self.vocab_size, head_dim = model.vocab_size, model.head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / model.rope_theta**exponents
        self.frequencies_D = torch.cat([frequencies, frequencies]).to(device)
        self.signs_D = torch.cat([-torch.ones(head_dim // 2), torch.ones(head_dim // 2)]).to(device)

    def build(self, plan: StepPlan, last_tokens: Tensor) -> ForwardBatch:
        """Advance the slots of the plan and lay out its tokens. Raises PlanError where the plan breaks the contract."""
        _check_named_once(plan)
        for prefill in plan.prefills:
            self.table.start_prefill(prefill)
        for slot in plan.decodes:
            self.table.start_decode(slot)
        decodes = np.array(plan.decodes, dtype=np.int64)
        slots = np.concatenate([*(np.full(len(p.token_ids), p.slot) for p in plan.prefills), decodes])
        starts = [np.arange(p.start, p.start + len(p.token_ids)) for p in plan.prefills]
        positions = np.concatenate([*starts, self.table.num_computed[decodes] - 1])
        cos_T1D, signed_sin_T1D = self._rotations(positions)
        num_prefill_tokens = len(positions) - len(decodes)
        sample_slots = np.array(plan.sampling_slots, dtype=np.int64)
        return ForwardBatch(
            token_ids_T=self._token_ids(plan, decodes, last_tokens),
            cos_T1D=cos_T1D,
            signed_sin_T1D=signed_sin_T1D,
            cells_T=self._tensor(self.table.cells(slots, positions)),
            chunks=list(self._chunks(plan.prefills)),
            decodes=list(self._decode_groups(decodes, num_prefill_tokens)),
            sample_rows_B=self._tensor(_sample_rows(plan, num_prefill_tokens)),
            sample_slots=sample_slots,
            sample_positions=self.table.num_computed[sample_slots],
        )

    def _tensor(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def _token_ids(self, plan: StepPlan, decodes: Ints, last_tokens: Tensor) -> Tensor:
        known = np.array([token for prefill in plan.prefills for token in prefill.token_ids], dtype=np.int64)
        if len(known) and not 0 <= known.min() <= known.max() < self.vocab_size:
            raise PlanError(
                f"prefill: token ids in [{known.min()}, {known.max()}], the vocabulary has {self.vocab_size}"
            )
        if not len(decodes):
            return self._tensor(known)
        sampled = last_tokens.index_select(0, self._tensor(decodes))
        return sampled if not len(known) else torch.cat([self._tensor(known), sampled])

    def _rotations(self, positions: Ints) -> tuple[Tensor, Tensor]:
        angles_T1D = self._tensor(positions).float()[:, None, None] * self.frequencies_D
        return angles_T1D.cos().to(self.dtype), angles_T1D.sin().mul_(self.signs_D).to(self.dtype)

    def _chunks(self, prefills: list[Prefill]) -> Iterator[PrefillChunk]:
        first = 0
        for prefill in prefills:
            size, start = len(prefill.token_ids), prefill.start
            num_blocks = -(-(start + size) // self.table.block_size)
            blocks = self._tensor(self.table.blocks[prefill.slot, :num_blocks])
            mask = None if start == 0 else self._chunk_mask(start, size)
            yield PrefillChunk(first=first, size=size, num_keys=start + size, block_ids=blocks, mask_CS=mask)
            first += size

    def _chunk_mask(self, start: int, size: int) -> Tensor:
        mask_CS = torch.full((size, start + size), -math.inf, device=self.device, dtype=self.dtype)
        return mask_CS.triu_(start + 1)

    def _decode_groups(self, slots: Ints, first: int) -> Iterator[DecodeGroup]:
        if not len(slots):
            return
        lengths = self.table.num_computed[slots]
        num_blocks = -(-int(lengths.max()) // self.table.block_size)
        keys = np.arange(num_blocks * self.table.block_size)
        hidden = np.where(keys < lengths[:, None], np.float32(0), np.float32(-np.inf))
        blocks = np.ascontiguousarray(self.table.blocks[slots, :num_blocks]).reshape(-1)
        # Entries behind a slot's own blocks may be left from an earlier sequence: they are masked, and valid ids.
        mask = torch.from_numpy(hidden[:, None, None, :]).to(self.device, self.dtype)
        yield DecodeGroup(first=first, size=len(slots), block_ids=self._tensor(blocks), mask_B11S=mask)


def _check_named_once(plan: StepPlan) -> None:
    computed = [prefill.slot for prefill in plan.prefills] + plan.decodes
    if len(set(computed)) < len(computed):
        raise PlanError(f"step {plan.step} computes a slot twice: {sorted(computed)}")


def _sample_rows(plan: StepPlan, num_prefill_tokens: int) -> Ints:
    ends = np.cumsum([len(p.token_ids) for p in plan.prefills], dtype=np.int64)
    sampled = [int(end) - 1 for end, prefill in zip(ends, plan.prefills, strict=True) if prefill.sample]
    return np.array([*sampled, *range(num_prefill_tokens, num_prefill_tokens + len(plan.decodes))], dtype=np.int64)
