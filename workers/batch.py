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
from workers.kernels.decode_attention import PagedKeys
from workers.kernels.paged import Blocks
from workers.slots import Ints, SlotStates
from workers.step import Prefill, StepPlan


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
class Decodes:
    """Rows that are the ends of as many sequences, each of which it sees from the start."""

    rows: slice
    keys: PagedKeys


BatchPart = Prompts | PrefillChunk | Decodes


@dataclass(frozen=True, kw_only=True)
class SequenceEnds:
    """The rows whose logits give a token: each the last of its sequence, so that it attends like a decode."""

    rows_B: Tensor
    rotations_B2D: Tensor
    keys: PagedKeys


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """What one forward pass reads. Rows are tokens: all chunks, then all decodes."""

    token_ids_T: Tensor
    rotations_T2D: Tensor
    """Cosines, and sines negated in their first half, of each row's position."""
    cells_T: Tensor
    parts: list[BatchPart]
    """In the order of their rows."""
    scored_rows_S: Tensor | None
    """Rows whose logits tell the logprobs of prompt tokens, chunk by chunk; None where nobody asks."""
    ends: SequenceEnds | None
    """None where every row is one, in a step of decodes alone, and where there is none."""
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
        self.vocab_size = model.vocab_size
        self.rotations_P2D = _rotations(model, slots.max_model_len).to(device, dtype)

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
        rotations_T2D = self.rotations_P2D.index_select(0, self._tensor(positions))
        parts: list[BatchPart] = list(self._prefill_parts(plan.prefills))
        if len(decodes):
            rows = slice(len(positions) - len(decodes), len(positions))
            parts.append(Decodes(rows=rows, keys=self._keys(decodes)))
        sample_slots = np.array(plan.sampling_slots, dtype=np.int64)
        return ForwardBatch(
            token_ids_T=self._token_ids(plan, decodes, last_tokens),
            rotations_T2D=rotations_T2D,
            cells_T=self._tensor(self.slots.cells(slots, positions)),
            parts=parts,
            scored_rows_S=self._scored_rows(plan.prefills),
            ends=self._ends(plan, sample_slots, rotations_T2D) if plan.prefills else None,
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

    def _scored_rows(self, prefills: list[Prefill]) -> Tensor | None:
        firsts = np.cumsum([0] + [len(prefill.token_ids) for prefill in prefills])
        rows = [
            np.arange(first, first + len(prefill.score.target_ids))
            for first, prefill in zip(firsts, prefills, strict=False)
            if prefill.score is not None
        ]
        return self._tensor(np.concatenate(rows)) if rows else None

    def _keys(self, slots: Ints) -> PagedKeys:
        num_keys = self.slots.num_computed[slots]
        longest = int(num_keys.max())
        # Entries behind a slot's own blocks may be left from an earlier sequence: they are not read, and valid ids.
        tables = self.slots.blocks[slots, : -(-longest // self.slots.block_size)]
        return PagedKeys(self._tensor(tables), self._tensor(num_keys), longest)

    def _ends(self, plan: StepPlan, slots: Ints, rotations_T2D: Tensor) -> SequenceEnds | None:
        """None where nobody samples."""
        if not len(slots):
            return None
        ends = np.cumsum([len(p.token_ids) for p in plan.prefills] + [1] * len(plan.decodes), dtype=np.int64)
        sampled = [p.sample for p in plan.prefills] + [True] * len(plan.decodes)
        rows_B = self._tensor(ends[sampled] - 1)
        rotations_B2D = rotations_T2D.index_select(0, rows_B)
        return SequenceEnds(rows_B=rows_B, rotations_B2D=rotations_B2D, keys=self._keys(slots))


def _check_named_once(plan: StepPlan) -> None:
    computed = [prefill.slot for prefill in plan.prefills] + plan.decodes
    if len(set(computed)) < len(computed):
        raise PlanError(f"step {plan.step} computes a slot twice: {sorted(computed)}")


def _rotations(model: ModelConfig, max_model_len: int) -> Tensor:
    """[P, 2, D] of every position: small beside the KV of one sequence of that length."""
    exponents_F = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    # A product with rounded frequencies, as in transformers: a quotient would differ at far positions.
    angles_PF = torch.arange(max_model_len, dtype=torch.float32)[:, None] * (1.0 / model.rope_theta**exponents_F)
    cos_PF, sin_PF = angles_PF.cos(), angles_PF.sin()
    return torch.stack([torch.cat([cos_PF, cos_PF], 1), torch.cat([-sin_PF, sin_PF], 1)], dim=1)
