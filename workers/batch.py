"""One step's inputs as tensors, built from the slots' integers: prefill chunks, one token per decoding slot, guesses.

Hop 7's first half: `BatchBuilder` lays out what a plan computes, with the slots' states at hand; `ForwardBatch` is
what the layers read. Knows nothing of weights. T tokens, B decoding sequences, S scored rows, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.config import ModelConfig
from workers.errors import PlanError
from workers.kernels.cpu.halves import StepRows
from workers.kernels.cpu.library import native
from workers.kernels.decode_attention import PagedKeys
from workers.kernels.prefill_attention import Chunks
from workers.slots import Ints, SlotStates
from workers.step import Draft, Prefill, StepPlan
from workers.transfers import to_device


@dataclass(frozen=True, kw_only=True)
class Prefills:
    """Chunks of known tokens, each behind what earlier steps computed of its sequence."""

    rows: slice
    chunks: Chunks


@dataclass(frozen=True, kw_only=True)
class Decodes:
    """Rows that see their sequences from the start up to themselves: their ends, and guesses at what follows."""

    rows: slice
    keys: PagedKeys


BatchPart = Prefills | Decodes

ROWS_AT_ONCE = 256
"""Of a part in which each row sees its sequence by itself: what they see is summed in memory for each of them."""


class PromptLayout(Enum):
    """How known tokens attend to their sequence."""

    CHUNKS = "chunks"
    """Those of a chunk together, which is fastest."""
    ROWS = "rows"
    """Each as if it were decoded, so that it gets the same bits whether it was known or sampled."""


@dataclass(frozen=True, kw_only=True)
class SequenceEnds:
    """The rows whose logits give a token: each the last of its sequence, so that it attends like a decode."""

    rows_B: Tensor
    rotations_B2D: Tensor
    keys: PagedKeys


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """What one forward pass reads. Rows are tokens: all chunks, then all decodes, then the guesses behind them."""

    token_ids_T: Tensor
    rotations_T2D: Tensor
    """Cosines, and sines negated in their first half, of each row's position."""
    cells_T: Tensor
    parts: list[BatchPart]
    """In the order of their rows."""
    step_rows: StepRows | None
    """The same for half a layer in one call; None where there is no such call."""
    scored_rows_S: Tensor | None
    """Rows whose logits tell the logprobs of prompt tokens, chunk by chunk; None where nobody asks."""
    ends: SequenceEnds | None
    """None where every row is one, in a step of decodes alone, and where there is none."""
    sample_slots: Ints
    """Whose tokens are sampled, in the order of `StepPlan.sampling_slots`; then a row for each guess."""
    sample_positions: Ints
    """Of the tokens to be sampled."""
    group_tokens: list[int]
    """Rows of every attention group in this step, this one's among them."""
    is_padding_T1: Tensor | None = None
    """Rows that are there for a fixed shape alone, and go to no expert; None: there are none."""

    @property
    def has_scores(self) -> bool:
        """Somebody asks for logprobs of a prompt."""
        return self.scored_rows_S is not None

    @property
    def is_every_row_sampled(self) -> bool:
        """A step of decodes alone."""
        return self.ends is None and self.scored_rows_S is None and len(self.sample_slots) > 0


class SequenceRows(NamedTuple):
    """Rows that see their sequences up to themselves: whose they are, and where in them."""

    slots: Ints
    positions: Ints


class BatchBuilder:
    """Turns a plan into a ForwardBatch on one device."""

    def __init__(
        self,
        slots: SlotStates,
        model: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        pool_blocks: int,
        layout: PromptLayout = PromptLayout.CHUNKS,
    ) -> None:
        """`pool_blocks`: of the pool, which may have more than are given out.

        `layout`: how known tokens attend.
        """
        self.layout = layout
        self.slots, self.device, self.pool_blocks = slots, device, pool_blocks
        self.vocab_size = model.vocab_size
        self.rotations_P2D = _rotations(model, slots.max_model_len).to(device, dtype)

    def build(self, plan: StepPlan, last_tokens: Tensor) -> ForwardBatch:
        """Advance the slots of the plan and lay out its tokens. Raises PlanError where the plan breaks the contract."""
        _check_named_once(plan)
        for prefill in plan.prefills:
            self.slots.start_prefill(prefill)
        for slot in plan.decodes:
            self.slots.start_decode(slot)
        singles = self._singles(plan)
        sampled = self._sampled(plan, singles)
        slots = np.concatenate([*(np.full(len(p.token_ids), p.slot) for p in plan.prefills), singles.slots])
        starts = [np.arange(p.start, p.start + len(p.token_ids)) for p in plan.prefills]
        positions = np.concatenate([*starts, singles.positions])
        rotations_T2D = self.rotations_P2D.index_select(0, self._tensor(positions))
        cells_T = self._tensor(self.slots.cells(slots, positions))
        if self.layout is PromptLayout.ROWS:
            singles = SequenceRows(slots, positions)
        chunks = self._chunks(plan.prefills) if len(singles.slots) < len(slots) else None
        keys = self._keys(singles) if len(singles.slots) else None
        num_known = len(positions) - len(singles.slots)
        parts: list[BatchPart] = []
        if chunks is not None:
            parts.append(Prefills(rows=slice(0, num_known), chunks=chunks))
        if keys is not None and self.layout is PromptLayout.ROWS:
            parts += _some_at_once(keys)
        elif keys is not None:
            parts.append(Decodes(rows=slice(num_known, len(positions)), keys=keys))
        return ForwardBatch(
            token_ids_T=self._token_ids(plan, last_tokens),
            rotations_T2D=rotations_T2D,
            cells_T=cells_T,
            parts=parts,
            step_rows=self.step_rows(rotations_T2D, cells_T, chunks, keys),
            scored_rows_S=self._scored_rows(plan.prefills),
            ends=self._ends(plan, sampled, rotations_T2D) if plan.prefills else None,
            sample_slots=sampled.slots,
            sample_positions=sampled.positions + 1,
            group_tokens=plan.group_tokens or [plan.num_tokens],
        )

    def decoded_rows(self, plan: StepPlan) -> SequenceRows:
        """Advance the slots of a plan without prefills, and tell its rows. Raises PlanError as `build` does."""
        _check_named_once(plan)
        for slot in plan.decodes:
            self.slots.start_decode(slot)
        return self._singles(plan)

    def guesses(self, drafts: list[Draft]) -> Ints:
        """Their tokens, one draft behind the other. Raises PlanError where one is in no vocabulary."""
        return self._checked("draft", drafts) if drafts else np.zeros(0, dtype=np.int64)

    def _singles(self, plan: StepPlan) -> SequenceRows:
        """A row for each decode, and then for each guess: it sees its sequence up to itself, as if it were the end."""
        decodes = np.array(plan.decodes, dtype=np.int64)
        if not plan.drafts:
            return SequenceRows(decodes, self.slots.num_computed[decodes] - 1)
        positions = [self.slots.num_computed[decodes] - 1]
        for draft in plan.drafts:
            start = self.slots.num_computed[draft.slot]
            positions.append(np.arange(start, start + len(draft.token_ids)))
            self.slots.start_draft(draft)
        slots = [np.full(len(draft.token_ids), draft.slot) for draft in plan.drafts]
        return SequenceRows(np.concatenate([decodes, *slots]), np.concatenate(positions))

    def _sampled(self, plan: StepPlan, singles: SequenceRows) -> SequenceRows:
        """The rows whose logits give a token: the ends of chunks that sample, and all of `singles`."""
        slots = np.array([prefill.slot for prefill in plan.prefills if prefill.sample], dtype=np.int64)
        ends = self.slots.num_computed[slots] - 1
        return SequenceRows(np.concatenate([slots, singles.slots]), np.concatenate([ends, singles.positions]))

    def _tensor(self, values: Ints) -> Tensor:
        return to_device(values, self.device)

    def _token_ids(self, plan: StepPlan, last_tokens: Tensor) -> Tensor:
        parts = []
        if plan.prefills:
            parts.append(self._known("prefill", plan.prefills))
        if plan.decodes:
            parts.append(last_tokens.index_select(0, self._tensor(np.array(plan.decodes, dtype=np.int64))))
        if plan.drafts:
            parts.append(self._known("draft", plan.drafts))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _known(self, what: str, chunks: Sequence[Prefill | Draft]) -> Tensor:
        return self._tensor(self._checked(what, chunks))

    def _checked(self, what: str, chunks: Sequence[Prefill | Draft]) -> Ints:
        known = np.array([token for chunk in chunks for token in chunk.token_ids], dtype=np.int64)
        if not 0 <= known.min() <= known.max() < self.vocab_size:
            raise PlanError(
                f"{what}: token ids in [{known.min()}, {known.max()}], the vocabulary has {self.vocab_size}"
            )
        return known

    def _chunks(self, prefills: list[Prefill]) -> Chunks:
        starts = np.array([prefill.start for prefill in prefills], dtype=np.int64)
        sizes = np.array([len(prefill.token_ids) for prefill in prefills], dtype=np.int64)
        num_blocks = -(-int((starts + sizes).max()) // self.slots.block_size)
        tables = self.slots.blocks[[prefill.slot for prefill in prefills], :num_blocks]
        return Chunks(tables_CM=self._tensor(tables), starts=starts, sizes=sizes)

    def step_rows(
        self, rotations_T2D: Tensor, cells_T: Tensor, chunks: Chunks | None, keys: PagedKeys | None
    ) -> StepRows | None:
        """For half a layer in one call; None where there is no such call."""
        if self.device.type != "cpu" or native() is None:
            return None
        block_size = self.slots.block_size
        return StepRows(rotations_T2D, cells_T, chunks, keys, num_blocks=self.pool_blocks, block_size=block_size)

    def _scored_rows(self, prefills: list[Prefill]) -> Tensor | None:
        firsts = np.cumsum([0] + [len(prefill.token_ids) for prefill in prefills])
        rows = [
            np.arange(first, first + len(prefill.score.target_ids))
            for first, prefill in zip(firsts, prefills, strict=False)
            if prefill.score is not None
        ]
        return self._tensor(np.concatenate(rows)) if rows else None

    def _keys(self, rows: SequenceRows) -> PagedKeys:
        num_keys = rows.positions + 1
        longest = int(num_keys.max())
        # Entries behind a slot's own blocks may be left from an earlier sequence: they are not read, and valid ids.
        tables = self.slots.blocks[rows.slots, : -(-longest // self.slots.block_size)]
        return PagedKeys(self._tensor(tables), self._tensor(num_keys), longest)

    def _ends(self, plan: StepPlan, sampled: SequenceRows, rotations_T2D: Tensor) -> SequenceEnds | None:
        """None where nobody samples."""
        if not len(sampled.slots):
            return None
        ends = np.cumsum([len(p.token_ids) for p in plan.prefills], dtype=np.int64)
        chunk_rows = ends[[p.sample for p in plan.prefills]] - 1
        rows_B = self._tensor(np.concatenate([chunk_rows, np.arange(ends[-1], len(rotations_T2D))]))
        rotations_B2D = rotations_T2D.index_select(0, rows_B)
        return SequenceEnds(rows_B=rows_B, rotations_B2D=rotations_B2D, keys=self._keys(sampled))


def _some_at_once(keys: PagedKeys) -> list[BatchPart]:
    """All rows of a step."""
    starts = range(0, len(keys.num_keys_B), ROWS_AT_ONCE)
    parts = [slice(start, min(start + ROWS_AT_ONCE, len(keys.num_keys_B))) for start in starts]
    return [
        Decodes(rows=rows, keys=PagedKeys(keys.tables_BM[rows], keys.num_keys_B[rows], keys.longest)) for rows in parts
    ]


def _check_named_once(plan: StepPlan) -> None:
    computed = [prefill.slot for prefill in plan.prefills] + plan.decodes
    if len(set(computed)) < len(computed):
        raise PlanError(f"step {plan.step} computes a slot twice: {sorted(computed)}")
    guessed = [draft.slot for draft in plan.drafts]
    if len(set(guessed)) < len(guessed) or not set(guessed) <= set(plan.decodes):
        raise PlanError(f"step {plan.step} guesses behind slots {sorted(guessed)}, it decodes {sorted(plan.decodes)}")


def _rotations(model: ModelConfig, max_model_len: int) -> Tensor:
    """[P, 2, D] of every position: small beside the KV of one sequence of that length."""
    exponents_F = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    # A product with rounded frequencies, as in transformers: a quotient would differ at far positions.
    angles_PF = torch.arange(max_model_len, dtype=torch.float32)[:, None] * (1.0 / model.rope_theta**exponents_F)
    cos_PF, sin_PF = angles_PF.cos(), angles_PF.sin()
    return torch.stack([torch.cat([cos_PF, cos_PF], 1), torch.cat([-sin_PF, sin_PF], 1)], dim=1)
