"""Embedding rows of this rank's part of the vocabulary."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from workers.layout import Span
from workers.parallel import RankGroup


class Embedding:
    """Rows [vocab.start, vocab.stop); a token outside them adds zeros, and the sum over ranks is the embedding."""

    def __init__(self, weight_vH: Tensor, vocab: Span, tp: RankGroup) -> None:
        self.weight_vH, self.vocab, self.tp = weight_vH, vocab, tp

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(token_ids_T, self.weight_vH)
        local_T = token_ids_T - self.vocab.start
        is_local_T = (local_T >= 0) & (local_T < self.vocab.size)
        x_TH = F.embedding(local_T.clamp(0, self.vocab.size - 1), self.weight_vH) * is_local_T.unsqueeze(1)
        return self.tp.all_reduce(x_TH)
