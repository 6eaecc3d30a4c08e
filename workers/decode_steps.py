"""Steps of decodes alone, each the same work on the same buffers, whatever it decodes: so they can be recorded.

Hops 7 to 9 in one: what the host knows of the rows is written into buffers, and everything from the token that a slot
sampled last to the one that it samples next happens on the device. Rows are padded to a bucket's: a padded row reads
and writes a spare block, goes to no expert, and is sampled for a slot that nobody has. Block tables live on the device
and change with the plan's deltas alone. Everything else takes the long way, of `BatchBuilder`.

B rows of a bucket, S slots, M blocks of a sequence, F fields of a row.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.batch import BatchBuilder, Decodes, ForwardBatch, SequenceRows
from workers.buckets import Bucket, Buckets
from workers.drawing import RowRules, drawn_from
from workers.graphs import Action, Recorder
from workers.kernels.decode_attention import PagedKeys
from workers.kv_pool import KVPool
from workers.model import Decoder
from workers.sampling import WIDTHS, Sampler
from workers.slots import Ints, SlotStates
from workers.step import ExtendSlot, OpenSlot, StepPlan
from workers.transfers import Upload, to_device

log = logging.getLogger(__name__)

NUM_CANDIDATES = WIDTHS[0]
"""Of each row; slots with a larger top_k, or without one, take the long way."""
PROGRESS_INTERVAL_S = 5.0
NUM_RULES = 5
"""Columns of `RowRules.as_ints`."""


class _Fields(NamedTuple):
    """What the device is told of each row, beside the rules of its draw; columns of an int64 matrix."""

    slots: Ints
    targets: Ints
    """Where the sampled token is kept for the next step; guesses are nobody's."""
    token_ids: Ints
    """Of guesses; the others are on the device."""
    is_known: Ints
    positions: Ints
    cells: Ints
    num_keys: Ints


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What recording took."""

    num_graphs: int
    num_bytes: int
    seconds: float


class BlockTables:
    """The blocks of all slots on the device; the last row is the spare slot's."""

    def __init__(self, slots: SlotStates, spare_block: int, device: torch.device) -> None:
        num_slots, width = slots.blocks.shape
        self.rows_SM = torch.zeros(num_slots + 1, width, dtype=torch.int64, device=device)
        self.rows_SM[num_slots] = spare_block
        self._slots, self._device = slots, device

    def follow(self, plan: StepPlan) -> None:
        """Tell the device of the plan's new blocks, which the slots have by now; all at once."""
        changes: list[OpenSlot | ExtendSlot] = [*plan.open, *plan.extend]
        grown = {change.slot: 0 for change in changes}
        for change in changes:
            grown[change.slot] += len(change.block_ids)
        if not any(grown.values()):
            return
        host, ends = self._slots.blocks, self._slots.num_slot_blocks
        firsts = [(slot * host.shape[1] + ends[slot] - count, count) for slot, count in grown.items()]
        index = np.concatenate([np.arange(first, first + count) for first, count in firsts])
        changes_2C = to_device(np.stack([index, host.reshape(-1)[index]]), self._device)
        self.rows_SM.view(-1).index_copy_(0, changes_2C[0], changes_2C[1])


class DecodeSteps:
    """One rank's. It shares the decoder, the sampler and the slots' states with the long way."""

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        batches: BatchBuilder,
        kv: KVPool,
        last_tokens: Tensor,
        buckets: Buckets,
        recorder: Recorder,
        num_groups: int,
    ) -> None:
        """`last_tokens` has a place behind the slots' own, and the pool a block behind those that are given out."""
        self._decoder, self._sampler, self._batches, self._kv = decoder, sampler, batches, kv
        self._slots, self._last_tokens, self._buckets = batches.slots, last_tokens, buckets
        self._recorder, self._num_groups = recorder, num_groups
        self._spare_slot = len(last_tokens) - 1
        device, most = batches.device, buckets.row_sizes[-1]
        self.tables = BlockTables(self._slots, self._slots.num_blocks, device)
        self._upload = Upload(most, len(_Fields._fields) + NUM_RULES, device)
        self._tokens_B = torch.zeros(most, dtype=torch.int64, device=device)
        self._padding = self._padding_rows(most)
        self._recorded: dict[Bucket, Action] = {}

    def prepare(self) -> Prepared:
        """Run each bucket once, which compiles and loads its kernels, and record it. All ranks do it together."""
        start, told_at = time.monotonic(), time.monotonic()
        buckets = list(self._buckets)
        for index, bucket in enumerate(buckets):
            self._upload.write(self._padding[: bucket.num_rows])
            self._compute(bucket)
            self._recorded[bucket] = self._recorder.record(partial(self._compute, bucket))
            if time.monotonic() - told_at > PROGRESS_INTERVAL_S:
                told_at = time.monotonic()
                log.info("decode steps: %d of %d sizes are recorded", index + 1, len(buckets))
        return Prepared(
            num_graphs=len(buckets),
            num_bytes=self._recorder.num_bytes,
            seconds=time.monotonic() - start,
        )

    def forget(self) -> None:
        """Nothing is recorded any more, and nothing can be run."""
        self._recorded.clear()

    def bucket_for(self, plan: StepPlan) -> Bucket | None:
        """The smallest that the plan fits in; None where it takes the long way. Ranks of a group agree on it."""
        groups = plan.group_tokens or [plan.num_tokens]
        if plan.prefills or not max(groups):
            return None
        slots = np.array(plan.decodes, dtype=np.int64)
        if not self._sampler.is_plainly_drawn(slots, NUM_CANDIDATES):
            return None
        longest = int(self._slots.num_computed[slots].max(initial=0)) + 1
        longest += max((len(draft.token_ids) for draft in plan.drafts), default=0)
        return self._buckets.bucket_for(max(groups), min(longest, self._slots.max_model_len))

    def run(self, plan: StepPlan, bucket: Bucket) -> tuple[Tensor, SequenceRows]:
        """Take the plan's rows through the model. Returns their tokens, [B], still on the device, and whose they are.

        Raises PlanError where the plan breaks the contract.
        """
        rows = self._batches.decoded_rows(plan)
        values = self._padding[: bucket.num_rows].copy()
        values[: len(rows.slots)] = self._values(plan, rows)
        self._upload.write(values)
        self._recorded[bucket]()
        return self._tokens_B[: len(rows.slots)], rows

    def _values(self, plan: StepPlan, rows: SequenceRows) -> Ints:
        num_firsts, num_rows = len(plan.decodes), len(rows.slots)
        guesses = self._batches.guesses(plan.drafts)
        known = np.concatenate([np.zeros(num_firsts, dtype=np.int64), guesses])
        targets = np.where(np.arange(num_rows) < num_firsts, rows.slots, self._spare_slot)
        fields = _Fields(
            slots=rows.slots,
            targets=targets,
            token_ids=known,
            is_known=(np.arange(num_rows) >= num_firsts).astype(np.int64),
            positions=rows.positions,
            cells=self._slots.cells(rows.slots, rows.positions),
            num_keys=rows.positions + 1,
        )
        rules = self._sampler.rules_of(rows.slots, rows.positions + 1)
        return np.concatenate([np.stack(fields, axis=1), rules.as_ints()], axis=1)

    def _padding_rows(self, count: int) -> Ints:
        zeros, ones = np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.int64)
        spare_cell = self._slots.num_blocks * self._slots.block_size
        spare = np.full(count, self._spare_slot)
        fields = _Fields(spare, spare, zeros, ones, zeros, np.full(count, spare_cell), ones)
        rules = RowRules(ones, np.ones(count), np.full(count, np.inf), np.zeros(count), zeros)
        return np.concatenate([np.stack(fields, axis=1), rules.as_ints()], axis=1)

    def _compute(self, bucket: Bucket) -> None:
        """What is recorded: from the buffers to the buffers."""
        batch, targets_B, rules_BF = self._batch(bucket)
        logits_Bv = self._decoder.logits(self._decoder.forward(batch, self._kv))
        candidates = self._sampler.exchange.likeliest(logits_Bv, NUM_CANDIDATES)
        token_ids_B = drawn_from(candidates, rules_BF).token_ids_B
        self._last_tokens.index_copy_(0, targets_B, token_ids_B)
        self._tokens_B[: bucket.num_rows].copy_(token_ids_B)

    def _batch(self, bucket: Bucket) -> tuple[ForwardBatch, Tensor, Tensor]:
        rows_BF, num_fields = self._upload.rows[: bucket.num_rows], len(_Fields._fields)
        columns = rows_BF[:, :num_fields].t().contiguous().unbind()
        slots_B, targets_B, known_B, is_known_B, positions_B, cells_B, num_keys_B = columns
        sampled_B = self._last_tokens.index_select(0, slots_B)
        num_blocks = -(-bucket.longest // self._slots.block_size)
        tables_BM = self.tables.rows_SM[:, :num_blocks].index_select(0, slots_B)
        rotations_B2D = self._batches.rotations_P2D.index_select(0, positions_B)
        keys = PagedKeys(tables_BM, num_keys_B, bucket.longest)
        # Other groups may have no rows at all.
        is_padded = self._num_groups > 1 or self._buckets.can_be_padded(bucket.num_rows)
        batch = ForwardBatch(
            token_ids_T=torch.where(is_known_B.bool(), known_B, sampled_B),
            rotations_T2D=rotations_B2D,
            cells_T=cells_B,
            parts=[Decodes(rows=slice(0, bucket.num_rows), keys=keys)],
            step_rows=self._batches.step_rows(rotations_B2D, cells_B, None, keys),
            scored_rows_S=None,
            ends=None,
            sample_slots=np.arange(bucket.num_rows),
            sample_positions=np.arange(bucket.num_rows),
            group_tokens=[bucket.num_rows] * self._num_groups,
            is_padding_T1=(slots_B == self._spare_slot).unsqueeze(1) if is_padded else None,
        )
        return batch, targets_B, rows_BF[:, num_fields:]
