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
from workers.drawing import Drawn, RowRules, draw, draw_of_top_k, drawn_from
from workers.errors import PlanError
from workers.grammar import Grammars
from workers.logprobs import Asked, LogprobTable
from workers.noise import row_keys
from workers.penalties import Penalties
from workers.step import Draft, OpenSlot
from workers.token_rules import TokenRuleTable
from workers.transfers import to_device

Ints = npt.NDArray[np.int64]

WIDTHS = (32, 256)
"""Candidates that a row gets: the fewest that suffice."""
MAX_EXCHANGED = WIDTHS[-1]
"""Rows that need more candidates than this get the whole vocabulary."""


@dataclass(frozen=True)
class Sampled:
    """One token per row, and the logprobs of the rows that asked; all still on the device."""

    token_ids_B: Tensor
    logprobs: list[LogprobTable]


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

    def is_plainly_drawn(self, slots: Ints, max_candidates: int) -> bool:
        """Whether these slots need nothing but a draw from so many of the likeliest tokens."""
        has_more = self.penalties.active[slots] | self.rules.active[slots] | self.wants_logprobs[slots]
        return not has_more.any() and bool((self.top_ks[slots] <= max_candidates).all())

    def sample(self, logits_Bv: Tensor, slots: Ints, positions: Ints) -> Sampled:
        """One token per row; `positions` are those of the tokens to be sampled."""
        if self.is_plain[slots].all():
            return Sampled(self.exchange.likeliest(logits_Bv, 1).token_ids_BC[:, 0], [])
        logits_Bv = self.penalties.apply(self.rules.apply(logits_Bv, slots, positions), slots)
        widths = self._widths(slots)
        if (widths == widths[0]).all():
            sampled = self._choose(self._candidates(logits_Bv, int(widths[0])), logits_Bv, slots, positions)
        else:
            sampled = self._sample_apart(logits_Bv, slots, positions, widths)
        self.penalties.count(slots, sampled.token_ids_B)
        return sampled

    def _widths(self, slots: Ints) -> Ints:
        """Candidates of each row: by its own needs, so that no other row changes how its probabilities are summed."""
        needed = np.maximum(self.top_ks[slots], self.num_logprobs[slots])
        every = max(self.exchange.parts[-1].stop, MAX_EXCHANGED + 1)
        return np.array([*WIDTHS, every])[np.searchsorted(WIDTHS, needed)]

    def _candidates(self, logits_Rv: Tensor, width: int) -> Candidates:
        if width > MAX_EXCHANGED:
            return self.exchange.everything(logits_Rv)
        return self.exchange.likeliest(logits_Rv, width)

    def _sample_apart(self, logits_Bv: Tensor, slots: Ints, positions: Ints, widths: Ints) -> Sampled:
        """Rows with few candidates do not pay for those that need them all."""
        token_ids_B = torch.empty(len(slots), dtype=torch.int64, device=self.device)
        logprobs: list[LogprobTable] = []
        for width in np.unique(widths).tolist():
            rows = np.flatnonzero(widths == width)
            rows_R = self._tensor(rows)
            logits_Rv = logits_Bv[rows_R]
            sampled = self._choose(self._candidates(logits_Rv, width), logits_Rv, slots[rows], positions[rows])
            token_ids_B[rows_R] = sampled.token_ids_B
            for table in sampled.logprobs:
                asked = [one._replace(owner=int(rows[one.owner])) for one in table.asked]
                logprobs.append(LogprobTable(table.values_RX, asked))
        return Sampled(token_ids_B, logprobs)

    def _choose(self, candidates: Candidates, logits_Bv: Tensor, slots: Ints, positions: Ints) -> Sampled:
        if (self.top_ks[slots] == 1).all():
            chosen_B1 = torch.zeros((len(slots), 1), dtype=torch.int64, device=self.device)
            drawn = Drawn(chosen_B1, candidates.token_ids_BC[:, 0])
        else:
            rules = self.rules_of(slots, positions)
            choose = draw if rules.cut_more_than_top_k else draw_of_top_k
            drawn = drawn_from(candidates, self._tensor(rules.as_ints()), choose)
        asking = np.flatnonzero(self.wants_logprobs[slots])
        if not len(asking):
            return Sampled(drawn.token_ids_B, [])
        table = self._logprobs(candidates, logits_Bv, drawn.chosen_B1, slots, asking)
        return Sampled(drawn.token_ids_B, [table])

    def rules_of(self, slots: Ints, positions: Ints) -> RowRules:
        """How rows of these slots are drawn, for tokens at these positions."""
        top_ps = np.where(self.top_ps[slots] < 1, self.top_ps[slots], np.inf)
        keys = row_keys(self.seeds[slots], positions)
        return RowRules(self.top_ks[slots], self.temperatures[slots], top_ps, self.min_ps[slots], keys)

    def _logprobs(
        self, candidates: Candidates, logits_Bv: Tensor, chosen_B1: Tensor, slots: Ints, asking: Ints
    ) -> LogprobTable:
        """Of the penalised distribution before temperature and cuts."""
        logprobs_BC = candidates.logits_BC - self.exchange.log_normalizer(logits_Bv).unsqueeze(1)
        sampled_B = logprobs_BC.gather(1, chosen_B1).squeeze(1)
        width = int(self.num_logprobs[slots[asking]].max())
        asked = [Asked(row, row, int(self.num_logprobs[slots[row]])) for row in asking.tolist()]
        return LogprobTable.of(sampled_B, logprobs_BC[:, :width], candidates.token_ids_BC[:, :width], asked)

    def _tensor(self, values: npt.NDArray[np.generic]) -> Tensor:
        return to_device(values, self.device)
