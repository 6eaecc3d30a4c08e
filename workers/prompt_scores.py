"""Logprobs of prompt tokens: what the model made of each, given those before it.

A part of hop 9. Of the raw distribution: no temperature, penalty or rule. S scored rows, v local vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from workers.candidates import CandidateExchange
from workers.logprobs import Asked, LogprobTable
from workers.step import Prefill
from workers.transfers import to_device

ROWS_AT_ONCE = 128
"""Logits of so many rows are in memory at a time."""


def score_prompts(
    prefills: list[Prefill], x_SH: Tensor, logits: Callable[[Tensor], Tensor], exchange: CandidateExchange
) -> LogprobTable:
    """Asked for by indices into `prefills`, once for each target. All ranks of a group do it together.

    `x_SH`: the scored rows of all chunks, in their order, as the decoder leaves them; `logits` makes [S, v] of them.
    """
    scores = [(index, prefill.score) for index, prefill in enumerate(prefills) if prefill.score is not None]
    owners = [(index, score.num_logprobs) for index, score in scores for _ in score.target_ids]
    asked = [Asked(row, index, num_top) for row, (index, num_top) in enumerate(owners)]
    target_ids = np.array([token for _, score in scores for token in score.target_ids], dtype=np.int64)
    # The longest number of likeliest tokens is computed for all.
    num_top = max(score.num_logprobs for _, score in scores)
    rows = torch.split(to_device(target_ids, x_SH.device), ROWS_AT_ONCE), torch.split(x_SH, ROWS_AT_ONCE)
    parts = [_score(x_RH, targets_R, num_top, logits, exchange) for targets_R, x_RH in zip(*rows, strict=True)]
    return LogprobTable(torch.cat(parts), asked)


def _score(
    x_RH: Tensor, targets_R: Tensor, num_top: int, logits: Callable[[Tensor], Tensor], exchange: CandidateExchange
) -> Tensor:
    """The table's rows."""
    logits_Rv = logits(x_RH)
    likeliest = exchange.likeliest(logits_Rv, max(num_top, 1))
    normalizer_R = exchange.log_normalizer(logits_Rv).double()
    named_R = exchange.logits_of(logits_Rv, targets_R) - normalizer_R
    top_RC = likeliest.logits_BC - normalizer_R.unsqueeze(1)
    return LogprobTable.of(named_R, top_RC, likeliest.token_ids_BC, []).values_RX
