"""Which tokens a slot may sample, and which it leans to: bias, bad words, stop tokens that come too early, grammars.

Hop 9's first part, on this rank's part of the vocabulary. All that a rule depends on are the slot's own output and
positions, so it holds whatever else is in the batch, and goes on where it was when a slot is opened again with its
output. Rows without rules keep their bits. B rows, v local vocabulary.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.errors import PlanError
from workers.grammar import Grammars, GrammarState, Mask
from workers.layout import Span
from workers.step import OpenSlot, TokenRules
from workers.transfers import to_device

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class TokenRuleTable:
    """The rules of every slot that has any."""

    def __init__(self, num_slots: int, vocab: Span, device: torch.device, grammars: Grammars | None = None) -> None:
        """Without `grammars`, no slot may have one."""
        self.vocab, self.device, self.grammars = vocab, device, grammars
        self.active = np.zeros(num_slots, dtype=np.bool_)
        self._slots: dict[int, SlotRules] = {}

    def open(self, opened: OpenSlot) -> None:
        """Take a slot's rules, and the output that it comes with."""
        self._slots.pop(opened.slot, None)
        self.active[opened.slot] = opened.rules is not None
        if opened.rules is not None:
            grammar = self._grammar(opened.rules, opened.output_ids)
            self._slots[opened.slot] = SlotRules(opened.rules, opened.output_ids, self.vocab, grammar)

    def _grammar(self, rules: TokenRules, output_ids: list[int]) -> GrammarState | None:
        if rules.grammar is None:
            return None
        if self.grammars is None:
            raise PlanError("a slot has a grammar, this rank has no tokenizer; send none")
        return GrammarState(rules.grammar, rules.stop_ids, self.grammars, output_ids)

    def apply(self, logits_Bv: Tensor, slots: Ints, positions: Ints) -> Tensor:
        """What the slots' rules make of their rows; `positions` are those of the tokens to be sampled."""
        rows = np.flatnonzero(self.active[slots])
        if not len(rows):
            return logits_Bv
        return self._mask(self._add(logits_Bv, rows, slots, positions), rows, slots)

    def _add(self, logits_Bv: Tensor, rows: Ints, slots: Ints, positions: Ints) -> Tensor:
        """Biases, and minus infinity for single tokens."""
        parts = [self._slots[int(slots[row])].changes(int(positions[row])) for row in rows]
        index = np.concatenate([np.full(len(ids), row) for row, (ids, _) in zip(rows, parts, strict=True)])
        ids, values = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return logits_Bv.index_put((self._tensor(index), self._tensor(ids)), self._tensor(values), accumulate=True)

    def _mask(self, logits_Bv: Tensor, rows: Ints, slots: Ints) -> Tensor:
        """Leave only what the grammars allow."""
        masks = {int(row): self._slots[int(slots[row])].allowed() for row in rows}
        by_row = {row: mask for row, mask in masks.items() if mask is not None}
        if not by_row:
            return logits_Bv
        allowed_Gv = self._tensor(np.stack([mask[self.vocab.start : self.vocab.stop] for mask in by_row.values()]))
        if len(by_row) == len(logits_Bv):
            return logits_Bv.masked_fill(~allowed_Gv, -math.inf)
        rows_G = self._tensor(np.array(list(by_row), dtype=np.int64))
        return logits_Bv.index_copy(0, rows_G, logits_Bv[rows_G].masked_fill(~allowed_Gv, -math.inf))

    def advance(self, slots: Ints, token_ids: list[int]) -> None:
        """Take note of the tokens that the slots have sampled."""
        for row in np.flatnonzero(self.active[slots]).tolist():
            self._slots[int(slots[row])].advance(token_ids[row])

    def _tensor(self, values: npt.NDArray[np.generic]) -> Tensor:
        return to_device(values, self.device)


class SlotRules:
    """One slot's rules and the end of its output."""

    def __init__(self, rules: TokenRules, output_ids: list[int], vocab: Span, grammar: GrammarState | None) -> None:
        self._vocab, self._grammar = vocab, grammar
        self._first_stop_position = rules.first_stop_position
        single = [word[0] for word in rules.bad_words if len(word) == 1]
        self._always = self._local([*rules.logit_bias, *((token, -math.inf) for token in single)])
        self._stops = self._masked(rules.stop_ids)
        self._phrases = [(word[:-1], word[-1]) for word in rules.bad_words if len(word) > 1]
        longest = max((len(start) for start, _ in self._phrases), default=0)
        self._tail = deque(output_ids[-longest:] if longest else [], maxlen=longest)

    def changes(self, position: int) -> tuple[Ints, Floats]:
        """Local token ids, and what to add to their logits, for the token at this position of the sequence."""
        parts = [self._always]
        # A grammar that is complete has nothing but stop tokens left.
        is_complete = self._grammar is not None and self._grammar.is_complete
        if position < self._first_stop_position and not is_complete:
            parts.append(self._stops)
        if self._phrases:
            tail = list(self._tail)
            parts.append(self._masked([last for start, last in self._phrases if tail[-len(start) :] == start]))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([values for _, values in parts])

    def allowed(self) -> Mask | None:
        """Which of all tokens the grammar lets come next; None: it has no say."""
        return None if self._grammar is None else self._grammar.allowed()

    def advance(self, token_id: int) -> None:
        """Take note of a sampled token."""
        self._tail.append(token_id)
        if self._grammar is not None:
            self._grammar.advance(token_id)

    def _masked(self, token_ids: list[int]) -> tuple[Ints, Floats]:
        """These tokens must not come."""
        return self._local([(token, -math.inf) for token in token_ids])

    def _local(self, biases: list[tuple[int, float]]) -> tuple[Ints, Floats]:
        """Those in this rank's part of the vocabulary."""
        start, stop = self._vocab.start, self._vocab.stop
        local = [(token - start, value) for token, value in biases if start <= token < stop]
        ids, values = ([token for token, _ in local], [value for _, value in local])
        return np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32)
