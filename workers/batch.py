"""One step's inputs as tensors, built from the slots' integers: prefill chunks first, then one token per decoding slot.

Hop 7's first half: `BatchBuilder` lays out what a plan computes, with the slots' states at hand; `ForwardBatch` is
what the layers read. Knows nothing of weights. T tokens, B decoding sequences, C tokens of a chunk, S keys, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from workers.config import ModelConfig
from workers.errors import PlanError
from workers.kernels.paged import Blocks
from workers.slots import Ints, SlotStates
from workers.step import Prefill, StepPlan

CPU_GROUP_BYTES = 2 * 2**20
"""Of K and V that decoding sequences gather at once, so that the cache still holds them when they are read.

Sequences of 256 tokens and more take three quarters of the time of one gather of all, short ones nearly as long.
"""
GPU_GROUP_BYTES = 2**30
"""Kernels are the wider the better; this bounds only their memory."""


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
    group_tokens: list[int]
    """Rows of every attention group in this step, this one's among them."""


class BatchBuilder:
    """Turns a plan into a ForwardBatch on one device."""

    def __init__(self, slots: SlotStates, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.slots, self.device, self.dtype = slots, device, dtype
        self.vocab_size, head_dim = model.vocab_size, model.head_dim
        key_bytes = 2 * model.num_kv_heads * head_dim * dtype.itemsize
        self.group_keys = (CPU_GROUP_BYTES if device.type == "cpu" else GPU_GROUP_BYTES) // key_bytes
        self.rotations_P21D = _rotations(model, slots.max_model_len).to(device, dtype)

    def build(self, plan: StepPlan, last_tokens: Tensor) -> ForwardBatch:
        """Advance the slots of the plan and lay out its tokens. Raises PlanError where the plan breaks the contract."""
        _check_named_once(plan)
        for prefill in plan.prefills:
            self.slots.start_prefill(prefill)
        for slot in plan.decodes:
            self.slots.start_decode(slot)
        decodes = np.array(plan.decodes, dtype=np.int64)
        slots = np.concatenate([*(np.full(len(p.token_ids), p.slot) for p in plan.prefills), decodes])
        starts = [np.arange(p.start, p.start + len(p.token_ids)) for p in plan.prefills]
        positions = np.concatenate([*starts, self.slots.num_computed[decodes] - 1])
        rotations = Rotations(self.rotations_P21D.index_select(0, self._tensor(positions)))
        parts: list[BatchPart] = list(self._prefill_parts(plan.prefills))
        parts += self._decode_groups(decodes, len(positions) - len(decodes))
        sample_slots = np.array(plan.sampling_slots, dtype=np.int64)
        return ForwardBatch(
            token_ids_T=self._token_ids(plan, decodes, last_tokens),
            rotations=rotations,
            cells_T=self._tensor(self.slots.cells(slots, positions)),
            parts=parts,
            ends=self._ends(plan, sample_slots, rotations) if plan.prefills else None,
            sample_slots=sample_slots,
            sample_positions=self.slots.num_computed[sample_slots],
            group_tokens=plan.group_tokens or [plan.num_tokens],
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
        num_blocks = -(-(start + size) // self.slots.block_size)
        blocks = self._blocks(self.slots.blocks[prefill.slot, :num_blocks])
        mask_CS = torch.full((size, start + size), -math.inf, device=self.device, dtype=self.dtype)
        return PrefillChunk(rows=slice(first, first + size), blocks=blocks, mask_CS=mask_CS.triu_(start + 1))

    def _decode_groups(self, slots: Ints, first: int) -> Iterator[DecodeGroup]:
        if not len(slots):
            return
        size = max(1, self.group_keys // int(self.slots.num_computed[slots].max()))
        for start in range(0, len(slots), size):
            yield self._decode_group(slots[start : start + size], first + start)

    def _decode_group(self, slots: Ints, first: int) -> DecodeGroup:
        lengths = self.slots.num_computed[slots]
        num_keys = int(lengths.max())
        # Entries behind a slot's own blocks may be left from an earlier sequence: they are masked, and valid ids.
        block_ids = self.slots.blocks[slots, : -(-num_keys // self.slots.block_size)].reshape(-1)
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
