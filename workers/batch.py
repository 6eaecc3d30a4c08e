"""One step's inputs as tensors, built from the slots' integers: prefill chunks first, then one token per decoding slot.

Hop 7's first half: `SlotTable` applies a plan's deltas and checks it against the contract; `ForwardBatch` is what
the layers read. Knows nothing of weights. T tokens, B decoding sequences, C tokens of a chunk, S keys, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.config import ModelConfig
from workers.errors import PlanError
from workers.kernels.paged import Blocks
from workers.step import OpenSlot, Prefill, StepPlan

Ints = npt.NDArray[np.int64]

CPU_GROUP_BYTES = 2 * 2**20
"""Of K and V that decoding sequences gather at once, so that the cache still holds them when they are read.

Sequences of 256 tokens and more take three quarters of the time of one gather of all, short ones nearly as long.
"""
GPU_GROUP_BYTES = 2**30
"""Kernels are the wider the better; this bounds only their memory."""


class SlotTable:
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


@dataclass(frozen=True)
class Rotations:
    """Cosines, and sines negated in their first half, of each row's position."""

    both_T21D: Tensor

    @property
    def cos_T1D(self) -> Tensor:
        return self.both_T21D[:, 0]

    @property
    def signed_sin_T1D(self) -> Tensor:
        return self.both_T21D[:, 1]

    def select(self, rows_B: Tensor) -> Rotations:
        return Rotations(self.both_T21D.index_select(0, rows_B))


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Chunks of equal size that start their sequences: nothing but their own rows is attended to."""

    rows: slice
    num_seqs: int


@dataclass(frozen=True, kw_only=True)
class PrefillChunk:
    """One sequence's chunk behind tokens of earlier steps."""

    rows: slice
    blocks: Blocks
    mask_CS: Tensor


@dataclass(frozen=True, kw_only=True)
class DecodeGroup:
    """Rows that are the ends of as many sequences, each of which it sees from the start."""

    rows: slice
    blocks: Blocks
    num_keys: int
    mask_B1S: Tensor | None
    """None where all have `num_keys` keys."""


BatchPart = Prompts | PrefillChunk | DecodeGroup


@dataclass(frozen=True, kw_only=True)
class SequenceEnds:
    """The rows whose logits give a token: each the last of its sequence, so that it attends like a decode."""

    rows_B: Tensor
    rotations: Rotations
    groups: list[DecodeGroup]


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """What one forward pass reads. Rows are tokens: all chunks, then all decodes."""

    token_ids_T: Tensor
    rotations: Rotations
    cells_T: Tensor
    parts: list[BatchPart]
    """In the order of their rows."""
    ends: SequenceEnds | None
    """None where every row is one, in a step of decodes alone."""
    sample_slots: Ints
    """Whose tokens are sampled, in the order of `StepPlan.sampling_slots`."""
    sample_positions: Ints
    """Of the tokens to be sampled."""


class BatchBuilder:
    """Turns a plan into a ForwardBatch on one device."""

    def __init__(self, table: SlotTable, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.table, self.device, self.dtype = table, device, dtype
        self.vocab_size, head_dim = model.vocab_size, model.head_dim
        key_bytes = 2 * model.num_kv_heads * head_dim * dtype.itemsize
        self.group_keys = (CPU_GROUP_BYTES if device.type == "cpu" else GPU_GROUP_BYTES) // key_bytes
        self.rotations_P21D = _rotations(model, table.max_model_len).to(device, dtype)

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
        rotations = Rotations(self.rotations_P21D.index_select(0, self._tensor(positions)))
        parts: list[BatchPart] = list(self._prefill_parts(plan.prefills))
        parts += self._decode_groups(decodes, len(positions) - len(decodes))
        sample_slots = np.array(plan.sampling_slots, dtype=np.int64)
        return ForwardBatch(
            token_ids_T=self._token_ids(plan, decodes, last_tokens),
            rotations=rotations,
            cells_T=self._tensor(self.table.cells(slots, positions)),
            parts=parts,
            ends=self._ends(plan, sample_slots, rotations) if plan.prefills else None,
            sample_slots=sample_slots,
            sample_positions=self.table.num_computed[sample_slots],
        )

    def _tensor(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def _blocks(self, ids: Ints) -> Blocks:
        if (ids[1:] - ids[:-1] == 1).all():
            return slice(int(ids[0]), int(ids[-1]) + 1)
        return self._tensor(ids)

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

    def _prefill_parts(self, prefills: list[Prefill]) -> Iterator[BatchPart]:
        first = 0
        for (is_prompt, size), group in groupby(prefills, key=lambda p: (p.start == 0, len(p.token_ids))):
            chunks = list(group)
            if is_prompt:
                yield Prompts(rows=slice(first, first + size * len(chunks)), num_seqs=len(chunks))
            else:
                yield from (self._chunk(p, first + size * index) for index, p in enumerate(chunks))
            first += size * len(chunks)

    def _chunk(self, prefill: Prefill, first: int) -> PrefillChunk:
        size, start = len(prefill.token_ids), prefill.start
        num_blocks = -(-(start + size) // self.table.block_size)
        blocks = self._blocks(self.table.blocks[prefill.slot, :num_blocks])
        mask_CS = torch.full((size, start + size), -math.inf, device=self.device, dtype=self.dtype)
        return PrefillChunk(rows=slice(first, first + size), blocks=blocks, mask_CS=mask_CS.triu_(start + 1))

    def _decode_groups(self, slots: Ints, first: int) -> Iterator[DecodeGroup]:
        if not len(slots):
            return
        size = max(1, self.group_keys // int(self.table.num_computed[slots].max()))
        for start in range(0, len(slots), size):
            yield self._decode_group(slots[start : start + size], first + start)

    def _decode_group(self, slots: Ints, first: int) -> DecodeGroup:
        lengths = self.table.num_computed[slots]
        num_keys = int(lengths.max())
        # Entries behind a slot's own blocks may be left from an earlier sequence: they are masked, and valid ids.
        block_ids = self.table.blocks[slots, : -(-num_keys // self.table.block_size)].reshape(-1)
        return DecodeGroup(
            rows=slice(first, first + len(slots)),
            blocks=self._blocks(block_ids),
            num_keys=num_keys,
            mask_B1S=None if (lengths == num_keys).all() else self._length_mask(lengths, num_keys),
        )

    def _length_mask(self, lengths: Ints, num_keys: int) -> Tensor:
        hidden = np.where(np.arange(num_keys) < lengths[:, None], np.float32(0), np.float32(-np.inf))
        return torch.from_numpy(hidden[:, None, :]).to(self.device, self.dtype)

    def _ends(self, plan: StepPlan, slots: Ints, rotations: Rotations) -> SequenceEnds:
        ends = np.cumsum([len(p.token_ids) for p in plan.prefills] + [1] * len(plan.decodes), dtype=np.int64)
        sampled = [p.sample for p in plan.prefills] + [True] * len(plan.decodes)
        rows_B = self._tensor(ends[sampled] - 1)
        return SequenceEnds(
            rows_B=rows_B, rotations=rotations.select(rows_B), groups=list(self._decode_groups(slots, 0))
        )


def _check_named_once(plan: StepPlan) -> None:
    computed = [prefill.slot for prefill in plan.prefills] + plan.decodes
    if len(set(computed)) < len(computed):
        raise PlanError(f"step {plan.step} computes a slot twice: {sorted(computed)}")


def _rotations(model: ModelConfig, max_model_len: int) -> Tensor:
    """[P, 2, 1, D] of every position: small beside the KV of one sequence of that length."""
    exponents_F = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    # A product with rounded frequencies, as in transformers: a quotient would differ at far positions.
    angles_PF = torch.arange(max_model_len, dtype=torch.float32)[:, None] * (1.0 / model.rope_theta**exponents_F)
    cos_PF, sin_PF = angles_PF.cos(), angles_PF.sin()
    return torch.stack([torch.cat([cos_PF, cos_PF], 1), torch.cat([-sin_PF, sin_PF], 1)], dim=1).unsqueeze(2)
