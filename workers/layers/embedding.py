"""Embedding rows of this rank's part of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.cpu.panels import PanelWeight
from workers.kernels.linear import Weight
from workers.layout import Span
from workers.rank_group import RankGroup


class Embedding:
    """Rows [vocab.start, vocab.stop); a token outside them adds zeros, and the sum over ranks is the embedding."""

    def __init__(self, weight_vH: Weight, vocab: Span, tp: RankGroup, dtype: torch.dtype) -> None:
        self.weight_vH, self.vocab, self.tp, self.dtype = weight_vH, vocab, tp, dtype

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        if self.tp.size == 1:
            return self._rows(token_ids_T)
        local_T = token_ids_T - self.vocab.start
        is_local_T = (local_T >= 0) & (local_T < self.vocab.size)
        x_TH = self._rows(local_T.clamp(0, self.vocab.size - 1)) * is_local_T.unsqueeze(1)
        return self.tp.all_reduce(x_TH)

    def _rows(self, rows_T: Tensor) -> Tensor:
        if isinstance(self.weight_vH, PanelWeight):
            return self.weight_vH.lookup(rows_T)
        assert isinstance(self.weight_vH, Tensor), "an embedding is not stored as FP8"
        return F.embedding(rows_T, self.weight_vH).to(self.dtype)
