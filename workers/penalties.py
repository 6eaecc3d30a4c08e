"""Counts of the tokens each slot has seen, on this rank's part of the vocabulary, and the penalties they bring.

The counts are allocated when the first slot asks. B rows, v local vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.layout import Span
from workers.step import OpenSlot
from workers.transfers import to_device


class Penalties:
    """Repetition counts prompt and output; presence and frequency count the output alone."""

    def __init__(self, num_slots: int, vocab: Span, device: torch.device) -> None:
        self.vocab, self.device, self.num_slots = vocab, device, num_slots
        self.active = np.zeros(num_slots, dtype=np.bool_)
        self.repetition = np.ones(num_slots, dtype=np.float32)
        self.presence = np.zeros(num_slots, dtype=np.float32)
        self.frequency = np.zeros(num_slots, dtype=np.float32)
        self._in_prompt: Tensor | None = None
        self._counts: Tensor | None = None

    def open(self, opened: OpenSlot) -> None:
        """Take a slot's penalties and the tokens it comes with."""
        slot, sampling = opened.slot, opened.sampling
        self.active[slot] = sampling.has_penalties
        if not sampling.has_penalties:
            return
        self.repetition[slot] = sampling.repetition_penalty
        self.presence[slot] = sampling.presence_penalty
        self.frequency[slot] = sampling.frequency_penalty
        in_prompt, counts = self._tables()
        in_prompt[slot] = self._histogram(opened.prompt_ids) > 0
        counts[slot] = self._histogram(opened.output_ids)

    def apply(self, logits_Bv: Tensor, slots: npt.NDArray[np.int64]) -> Tensor:
        """Repetition first, then frequency and presence. Rows without penalties keep their bits."""
        rows = np.flatnonzero(self.active[slots])
        if not len(rows):
            return logits_Bv
        penalized = slots[rows]
        in_prompt, counts = self._tables()
        rows_P, slots_P = self._tensor(rows), self._tensor(penalized)
        counts_Pv, logits_Pv = counts[slots_P], logits_Bv[rows_P]
        repetition_P1 = self._tensor(self.repetition[penalized]).unsqueeze(1)
        repeated_Pv = torch.where(logits_Pv > 0, logits_Pv / repetition_P1, logits_Pv * repetition_P1)
        logits_Pv = torch.where(in_prompt[slots_P] | (counts_Pv > 0), repeated_Pv, logits_Pv)
        logits_Pv -= self._tensor(self.frequency[penalized]).unsqueeze(1) * counts_Pv
        logits_Pv -= self._tensor(self.presence[penalized]).unsqueeze(1) * (counts_Pv > 0)
        return logits_Bv.index_copy(0, rows_P, logits_Pv)

    def count(self, slots: npt.NDArray[np.int64], token_ids_B: Tensor) -> None:
        """Take note of sampled tokens; never waits for the device."""
        rows = np.flatnonzero(self.active[slots])
        if not len(rows):
            return
        local_P = token_ids_B[self._tensor(rows)] - self.vocab.start
        is_local_P = (local_P >= 0) & (local_P < self.vocab.size)
        index = (self._tensor(slots[rows]), local_P.clamp(0, self.vocab.size - 1))
        self._tables()[1].index_put_(index, is_local_P.int(), accumulate=True)

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._in_prompt is None or self._counts is None:
            shape = (self.num_slots, self.vocab.size)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
        return self._in_prompt, self._counts

    def _histogram(self, token_ids: list[int]) -> Tensor:
        ids = np.array(token_ids, dtype=np.int64) - self.vocab.start
        local = ids[(ids >= 0) & (ids < self.vocab.size)]
        return self._tensor(np.bincount(local, minlength=self.vocab.size).astype(np.int32))

    def _tensor(self, values: npt.NDArray[np.generic]) -> Tensor:
        return to_device(values, self.device)
