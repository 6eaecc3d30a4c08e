"""The likeliest tokens of each row, from every part of the vocabulary: all ranks of an attention group get the same.

Of equal logits, the lowest token id comes first, whatever the batch, the number of candidates or of ranks: bf16 gives
ties all the time. B rows, C candidates per row (likeliest first), v local vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.kernels.triton.choice import has_triton
from workers.layout import Span
from workers.rank_group import RankGroup

ID_MASK = 2**32 - 1
SIGNLESS = 2**31 - 1
LEAST_KEY = -(2**63)
"""Below the key of every token."""


@dataclass(frozen=True)
class Candidates:
    """Token ids and logits, likeliest first; of equal ones, the lowest id first."""

    token_ids_BC: Tensor
    logits_BC: Tensor


class CandidateExchange:
    """Knows how the vocabulary is split."""

    def __init__(self, tp: RankGroup, vocab_parts: list[Span]) -> None:
        self.tp = tp
        self.parts = vocab_parts
        self.vocab = vocab_parts[tp.index]

    def likeliest(self, logits_Bv: Tensor, count: int) -> Candidates:
        """The `count` likeliest tokens: each rank offers its own, and only those travel."""
        count = min(count, self.parts[-1].stop)
        if has_triton(logits_Bv.device.type):
            return self._likeliest_at_once(logits_Bv, count)
        local = _likeliest(logits_Bv, min(count, logits_Bv.shape[1]))
        if self.tp.size == 1:
            return local
        keys_BC = _keys(local.logits_BC, local.token_ids_BC + self.vocab.start)
        # Short parts are padded to the same width.
        padded_BC = torch.nn.functional.pad(keys_BC, (0, count - keys_BC.shape[1]), value=LEAST_KEY)
        gathered_BX = self.tp.all_gather(padded_BC).transpose(0, 1).flatten(1)
        return _candidates(gathered_BX.topk(count, dim=-1).values)

    def _likeliest_at_once(self, logits_Bv: Tensor, count: int) -> Candidates:
        """By kernels that pack and unpack keys themselves."""
        from workers.kernels.triton.candidates import likeliest, likeliest_keys

        if self.tp.size == 1:
            return Candidates(*likeliest(logits_Bv, count))
        keys_BC = likeliest_keys(logits_Bv, min(count, logits_Bv.shape[1]), self.vocab.start)
        if missing := count - keys_BC.shape[1]:
            keys_BC = torch.nn.functional.pad(keys_BC, (0, missing), value=LEAST_KEY)
        return Candidates(*likeliest(self.tp.all_gather(keys_BC).transpose(0, 1).flatten(1), count))

    def everything(self, logits_Bv: Tensor) -> Candidates:
        """The whole vocabulary, likeliest first: for rows without a top_k."""
        logits_BV = self._whole(logits_Bv)
        sorted_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        return Candidates(ids_BV, sorted_BV)

    def log_normalizer(self, logits_Bv: Tensor) -> Tensor:
        """log of the sum of exp over the whole vocabulary, [B]."""
        return self.tp.all_gather(logits_Bv.logsumexp(dim=-1)).logsumexp(dim=0)

    def logits_of(self, logits_Bv: Tensor, token_ids_B: Tensor) -> Tensor:
        """Each row's logit of one token, wherever it is in the vocabulary, [B]."""
        local_B = token_ids_B - self.vocab.start
        is_local_B = (local_B >= 0) & (local_B < self.vocab.size)
        found_B = logits_Bv.gather(1, local_B.clamp(0, self.vocab.size - 1).unsqueeze(1)).squeeze(1)
        return self.tp.all_gather(found_B.masked_fill(~is_local_B, -torch.inf)).amax(dim=0)

    def _whole(self, logits_Bv: Tensor) -> Tensor:
        if self.tp.size == 1:
            return logits_Bv
        width = max(part.size for part in self.parts)
        padded_Bw = torch.nn.functional.pad(logits_Bv, (0, width - logits_Bv.shape[1]))
        gathered = self.tp.all_gather(padded_Bw)
        return torch.cat([rows[:, : part.size] for rows, part in zip(gathered, self.parts, strict=True)], dim=1)


def _likeliest(logits_Bv: Tensor, count: int) -> Candidates:
    """The first `count` of one part; ids count from its start."""
    if count == 1:
        logits_B1, ids_B1 = logits_Bv.max(dim=-1, keepdim=True)  # names the first of equals
        return Candidates(ids_B1, logits_B1)
    # One more than asked for, which shows whether there are equals on both sides of the border.
    top_BC, ids_BC = logits_Bv.topk(min(count + 1, logits_Bv.shape[1]), dim=-1)
    if (top_BC[:, 1:] == top_BC[:, :-1]).any():
        return _in_order_of_ids(logits_Bv, top_BC, ids_BC, count)
    return Candidates(ids_BC[:, :count], top_BC[:, :count])


def _in_order_of_ids(logits_Bv: Tensor, top_BC: Tensor, ids_BC: Tensor, count: int) -> Candidates:
    """topk puts equals in any order, and takes any of those at the border: only there is all of a row looked at."""
    keys_BC = _keys(top_BC, ids_BC).sort(dim=-1, descending=True).values[:, :count]
    rows_R = (top_BC[:, count:] == top_BC[:, count - 1 : count]).any(dim=-1).nonzero().squeeze(1)
    if len(rows_R):
        ids_v = torch.arange(logits_Bv.shape[1], device=logits_Bv.device)
        keys_BC[rows_R] = _keys(logits_Bv[rows_R], ids_v).topk(count, dim=-1).values
    return _candidates(keys_BC)


def _keys(logits: Tensor, token_ids: Tensor) -> Tensor:
    """One int64 per fp32 logit and token id, all different: larger for a larger logit, of equal ones for a lower id."""
    bits = (logits.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0, its equal
    # The bits of negative floats grow with their size: turned round, all bits grow with the value.
    ordered = bits ^ ((bits >> 31) & SIGNLESS)
    return (ordered.long() << 32) + (ID_MASK - token_ids)


def _candidates(keys_BC: Tensor) -> Candidates:
    """What `_keys` packed."""
    ordered_BC = (keys_BC >> 32).int()
    bits_BC = ordered_BC ^ ((ordered_BC >> 31) & SIGNLESS)
    return Candidates(ID_MASK - (keys_BC & ID_MASK), bits_BC.view(torch.float32))
