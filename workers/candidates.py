"""The likeliest tokens of each row, gathered from every rank's part of the vocabulary: all ranks get the same.

B rows, C candidates per row (likeliest first), v local vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.layout import Span
from workers.parallel import ParallelState


@dataclass(frozen=True)
class Candidates:
    """Token ids and logits, likeliest first."""

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
        local_count = min(count, logits_Bv.shape[1])
        top_BC, ids_BC = logits_Bv.topk(local_count, dim=-1)
        ids_BC += self.vocab.start
        if self.parallel.world_size == 1:
            return Candidates(ids_BC, top_BC)
        # Ids ride as fp64 beside the logits, exactly: one collective instead of two. Short parts are padded to the
        # same width.
        packed_B2C = torch.full((len(logits_Bv), 2, count), -torch.inf, dtype=torch.float64, device=logits_Bv.device)
        packed_B2C[:, 0, :local_count] = ids_BC.double()
        packed_B2C[:, 1, :local_count] = top_BC.double()
        gathered_B2X = self.parallel.all_gather(packed_B2C).permute(1, 2, 0, 3).flatten(2)
        merged_BC, order_BC = gathered_B2X[:, 1].sort(dim=-1, descending=True, stable=True)
        ids_BC = gathered_B2X[:, 0].gather(1, order_BC[:, :count])
        return Candidates(ids_BC.long(), merged_BC[:, :count].to(logits_Bv.dtype))

    def everything(self, logits_Bv: Tensor) -> Candidates:
        """The whole vocabulary, likeliest first: for rows without a top_k."""
        logits_BV = self._whole(logits_Bv)
        sorted_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        return Candidates(ids_BV, sorted_BV)

    def log_normalizer(self, logits_Bv: Tensor) -> Tensor:
        """log of the sum of exp over the whole vocabulary, [B]."""
        return self.parallel.all_gather(logits_Bv.logsumexp(dim=-1)).logsumexp(dim=0)

    def _whole(self, logits_Bv: Tensor) -> Tensor:
        if self.parallel.world_size == 1:
            return logits_Bv
        width = max(part.size for part in self.parts)
        padded_Bw = torch.nn.functional.pad(logits_Bv, (0, width - logits_Bv.shape[1]))
        gathered = self.parallel.all_gather(padded_Bw)
        return torch.cat([rows[:, : part.size] for rows, part in zip(gathered, self.parts, strict=True)], dim=1)
