"""Logits to tokens, on every rank alike: the same candidates and the same noise give the same token, so nothing is
broadcast.

Hop 9. Token rules change the raw logits; then come the cuts in the order of transformers: penalties, temperature,
top_k, top_p, min_p. A token is the argmax of logit / temperature plus Gumbel noise over what is left. B rows, C
candidates (likeliest first), v local vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.candidates import CandidateExchange, Candidates
from workers.errors import PlanError
from workers.grammar import Grammars
from workers.noise import gumbel, row_keys
from workers.penalties import Penalties
from workers.step import Draft, OpenSlot, TokenLogprobs
from workers.token_rules import TokenRuleTable

Ints = npt.NDArray[np.int64]

MAX_EXCHANGED = 256
"""Rows that need more candidates than this get the whole vocabulary."""


@dataclass(frozen=True)
class Sampled:
    """One token per row, still on the device, and the logprobs of the rows that asked."""

    token_ids_B: Tensor
    logprobs: dict[int, TokenLogprobs]


class Sampler:
    """Holds how each slot samples; a batch is sampled without a loop over its rows."""

    def __init__(
        self, num_slots: int, exchange: CandidateExchange, device: torch.device, grammars: Grammars | None = None
    ) -> None:
        """Without `grammars`, no slot may have one."""
        self.exchange, self.device = exchange, device
        self.penalties = Penalties(num_slots, exchange.vocab, device)
        self.rules = TokenRuleTable(num_slots, exchange.vocab, device, grammars)
        self.temperatures = np.ones(num_slots, dtype=np.float64)
        self.top_ks = np.ones(num_slots, dtype=np.int64)
        self.top_ps = np.ones(num_slots, dtype=np.float64)
        self.min_ps = np.zeros(num_slots, dtype=np.float64)
        self.seeds = np.zeros(num_slots, dtype=np.uint64)
        self.is_plain = np.ones(num_slots, dtype=np.bool_)
        """Greedy, without rules, penalties and logprobs."""
        self.wants_logprobs = np.zeros(num_slots, dtype=np.bool_)
        self.num_logprobs = np.zeros(num_slots, dtype=np.int64)

    def open(self, opened: OpenSlot) -> None:
        """Take a slot's parameters. Greedy is a top_k of one; no top_k is one of the whole vocabulary."""
        slot, sampling, vocab_size = opened.slot, opened.sampling, self.exchange.parts[-1].stop
        is_greedy = sampling.temperature == 0
        self.temperatures[slot] = 1.0 if is_greedy else sampling.temperature
        self.top_ks[slot] = 1 if is_greedy else min(sampling.top_k or vocab_size, vocab_size)
        self.top_ps[slot], self.min_ps[slot] = sampling.top_p, sampling.min_p
        self.seeds[slot] = sampling.seed
        self.wants_logprobs[slot] = sampling.num_logprobs is not None
        self.num_logprobs[slot] = min(sampling.num_logprobs or 0, vocab_size)
        is_free = opened.rules is None and not sampling.has_penalties
        self.is_plain[slot] = is_greedy and sampling.num_logprobs is None and is_free
        self.penalties.open(opened)
        self.rules.open(opened)

    def check_drafts(self, drafts: list[Draft]) -> None:
        """Raises PlanError where the tokens of a slot with a draft depend on more than what is before them."""
        for draft in drafts:
            slot = draft.slot
            if self.penalties.active[slot] or self.rules.active[slot] or self.wants_logprobs[slot]:
                raise PlanError(f"draft: slot {slot} has rules, penalties or logprobs, which drafts cannot have")

    def sample(self, logits_Bv: Tensor, slots: Ints, positions: Ints) -> Sampled:
        """One token per row; `positions` are those of the tokens to be sampled."""
        if self.is_plain[slots].all():
            return Sampled(self.exchange.likeliest(logits_Bv, 1).token_ids_BC[:, 0], {})
        logits_Bv = self.penalties.apply(self.rules.apply(logits_Bv, slots, positions), slots)
        needed = np.maximum(self.top_ks[slots], self.num_logprobs[slots])
        narrow, wide = np.flatnonzero(needed <= MAX_EXCHANGED), np.flatnonzero(needed > MAX_EXCHANGED)
        if len(narrow) == len(slots):
            sampled = self._choose(self.exchange.likeliest(logits_Bv, int(needed.max())), logits_Bv, slots, positions)
        elif len(wide) == len(slots):
            sampled = self._choose(self.exchange.everything(logits_Bv), logits_Bv, slots, positions)
        else:
            sampled = self._sample_apart(logits_Bv, slots, positions, (narrow, wide))
        self.penalties.count(slots, sampled.token_ids_B)
        return sampled

    def _sample_apart(self, logits_Bv: Tensor, slots: Ints, positions: Ints, groups: tuple[Ints, Ints]) -> Sampled:
        """Rows with few candidates do not pay for those that need them all."""
        token_ids_B = torch.empty(len(slots), dtype=torch.int64, device=self.device)
        logprobs: dict[int, TokenLogprobs] = {}
        for rows, is_wide in zip(groups, (False, True), strict=True):
            rows_R = self._tensor(rows)
            logits_Rv = logits_Bv[rows_R]
            count = int(np.maximum(self.top_ks[slots[rows]], self.num_logprobs[slots[rows]]).max())
            everything = self.exchange.everything
            candidates = everything(logits_Rv) if is_wide else self.exchange.likeliest(logits_Rv, count)
            sampled = self._choose(candidates, logits_Rv, slots[rows], positions[rows])
            token_ids_B[rows_R] = sampled.token_ids_B
            logprobs |= {int(rows[index]): value for index, value in sampled.logprobs.items()}
        return Sampled(token_ids_B, logprobs)

    def _choose(self, candidates: Candidates, logits_Bv: Tensor, slots: Ints, positions: Ints) -> Sampled:
        if (self.top_ks[slots] == 1).all():
            chosen_B1 = torch.zeros((len(slots), 1), dtype=torch.int64, device=self.device)
        else:
            chosen_B1 = self._draw(candidates, slots, positions)
        token_ids_B = candidates.token_ids_BC.gather(1, chosen_B1).squeeze(1)
        asking = np.flatnonzero(self.wants_logprobs[slots])
        if not len(asking):
            return Sampled(token_ids_B, {})
        return Sampled(token_ids_B, self._logprobs(candidates, logits_Bv, chosen_B1, slots, asking))

    def _draw(self, candidates: Candidates, slots: Ints, positions: Ints) -> Tensor:
        """Index of the drawn candidate of each row, [B, 1]."""
        scaled_BC = candidates.logits_BC.double() / self._column(self.temperatures[slots])
        kept_BC = self._kept(scaled_BC, slots)
        keys_B = self._tensor(row_keys(self.seeds[slots], positions))
        noisy_BC = scaled_BC + gumbel(keys_B, candidates.token_ids_BC)
        return noisy_BC.masked_fill_(~kept_BC, -torch.inf).argmax(dim=-1, keepdim=True)

    def _kept(self, scaled_BC: Tensor, slots: Ints) -> Tensor:
        """What top_k, top_p and min_p leave; the likeliest token always stays."""
        ranks_C = torch.arange(scaled_BC.shape[1], device=self.device)
        kept_BC = ranks_C < self._column(self.top_ks[slots])
        if (self.top_ps[slots] < 1).any() or (self.min_ps[slots] > 0).any():
            probs_BC = scaled_BC.masked_fill(~kept_BC, -torch.inf).softmax(dim=-1)
            before_BC = probs_BC.cumsum(dim=-1) - probs_BC
            # top_p 1 keeps all: rounding must not cut the tail.
            top_ps = np.where(self.top_ps[slots] < 1, self.top_ps[slots], np.inf)
            kept_BC &= before_BC < self._column(top_ps)
            kept_BC &= probs_BC >= probs_BC[:, :1] * self._column(self.min_ps[slots])
            kept_BC[:, 0] = True
        return kept_BC

    def _logprobs(
        self, candidates: Candidates, logits_Bv: Tensor, chosen_B1: Tensor, slots: Ints, asking: Ints
    ) -> dict[int, TokenLogprobs]:
        """Of the penalised distribution before temperature and cuts."""
        logprobs_BC = (candidates.logits_BC - self.exchange.log_normalizer(logits_Bv).unsqueeze(1)).double()
        sampled = logprobs_BC.gather(1, chosen_B1).squeeze(1).tolist()
        width = int(self.num_logprobs[slots[asking]].max())
        ids, values = candidates.token_ids_BC[:, :width].tolist(), logprobs_BC[:, :width].tolist()
        result = {}
        for row in asking.tolist():
            count = int(self.num_logprobs[slots[row]])
            # What a rule masks is no candidate, however many are asked for.
            top = [pair for pair in zip(ids[row][:count], values[row][:count], strict=True) if pair[1] > -np.inf]
            result[row] = TokenLogprobs(logprob=sampled[row], top=top)
        return result

    def _column(self, values: npt.NDArray[np.generic]) -> Tensor:
        return self._tensor(values).unsqueeze(1)

    def _tensor(self, values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self.device)
