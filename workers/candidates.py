"""The likeliest tokens of each row, gathered from every rank's part of the vocabulary: all ranks get the same.

Of equal logits, the lowest token id comes first, whatever the batch, the number of candidates or of ranks: bf16 gives
ties all the time. B rows, C candidates per row (likeliest first), v local vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.layout import Span
from workers.parallel import ParallelState


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

    def __init__(self, parallel: ParallelState, vocab_parts: list[Span]) -> None:
        self.parallel = parallel
        self.parts = vocab_parts
        self.vocab = vocab_parts[parallel.rank]

    def likeliest(self, logits_Bv: Tensor, count: int) -> Candidates:
        """The `count` likeliest tokens: each rank offers its own, and only those travel."""
        count = min(count, self.parts[-1].stop)
        if count == self.parallel.world_size == 1:
            logits_B1, ids_B1 = logits_Bv.max(dim=-1, keepdim=True)
            return Candidates(ids_B1, logits_B1)
        keys_BC = self._local_keys(logits_Bv, min(count, logits_Bv.shape[1]))
        if self.parallel.world_size > 1:
            # Short parts are padded to the same width.
            padded_BC = torch.nn.functional.pad(keys_BC, (0, count - keys_BC.shape[1]), value=LEAST_KEY)
            keys_BC = self.parallel.all_gather(padded_BC).transpose(0, 1).flatten(1).topk(count, dim=-1).values
        return _candidates(keys_BC)

    def everything(self, logits_Bv: Tensor) -> Candidates:
        """The whole vocabulary, likeliest first: for rows without a top_k."""
        logits_BV = self._whole(logits_Bv)
        sorted_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        return Candidates(ids_BV, sorted_BV)

    def log_normalizer(self, logits_Bv: Tensor) -> Tensor:
        """log of the sum of exp over the whole vocabulary, [B]."""
        return self.parallel.all_gather(logits_Bv.logsumexp(dim=-1)).logsumexp(dim=0)

    def _local_keys(self, logits_Bv: Tensor, count: int) -> Tensor:
        """The largest keys of this rank's part, [B, count], in descending order."""
        if count == 1:
            logits_B1, ids_B1 = logits_Bv.max(dim=-1, keepdim=True)
            return _keys(logits_B1, ids_B1 + self.vocab.start)
        # One more than asked for: if its logit equals the last one's, topk has chosen among equals as it liked.
        top_BC, ids_BC = logits_Bv.topk(min(count + 1, logits_Bv.shape[1]), dim=-1)
        keys_BC = _keys(top_BC, ids_BC + self.vocab.start).sort(dim=-1, descending=True).values[:, :count]
        tied = (top_BC[:, count - 1] == top_BC[:, -1]).nonzero().squeeze(1) if top_BC.shape[1] > count else []
        if len(tied):
            ids_v = torch.arange(self.vocab.start, self.vocab.stop, device=logits_Bv.device)
            keys_BC[tied] = _keys(logits_Bv[tied], ids_v).topk(count, dim=-1).values
        return keys_BC

    def _whole(self, logits_Bv: Tensor) -> Tensor:
        if self.parallel.world_size == 1:
            return logits_Bv
        width = max(part.size for part in self.parts)
        padded_Bw = torch.nn.functional.pad(logits_Bv, (0, width - logits_Bv.shape[1]))
        gathered = self.parallel.all_gather(padded_Bw)
        return torch.cat([rows[:, : part.size] for rows, part in zip(gathered, self.parts, strict=True)], dim=1)


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
