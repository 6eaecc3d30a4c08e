"""Logprobs of prompt tokens: what the model made of each, given those before it.

A part of hop 9. Of the raw distribution: no temperature, penalty or rule. S scored rows, v local vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from workers.candidates import CandidateExchange
from workers.step import Prefill, TokenLogprobs

ROWS_AT_ONCE = 128
"""Logits of so many rows are in memory at a time."""


def score_prompts(
    prefills: list[Prefill], x_SH: Tensor, logits: Callable[[Tensor], Tensor], exchange: CandidateExchange
) -> dict[int, list[TokenLogprobs]]:
    """Index into `prefills` -> the logprobs of its targets. All ranks of a group do it together.

    `x_SH`: the scored rows of all chunks, in their order, as the decoder leaves them; `logits` makes [S, v] of them.
    """
    asking = [(index, prefill.score) for index, prefill in enumerate(prefills) if prefill.score is not None]
    target_ids = torch.tensor([token for _, score in asking for token in score.target_ids], device=x_SH.device)
    num_top = max(score.num_logprobs for _, score in asking)
    rows = _score(x_SH, target_ids, num_top, logits, exchange)
    # Not `zip(score.target_ids, rows)`: the longest number of likeliest tokens was computed for all.
    return {index: [_first(next(rows), score.num_logprobs) for _ in score.target_ids] for index, score in asking}


def _score(
    x_SH: Tensor, target_ids_S: Tensor, num_top: int, logits: Callable[[Tensor], Tensor], exchange: CandidateExchange
) -> Iterator[TokenLogprobs]:
    for first in range(0, len(x_SH), ROWS_AT_ONCE):
        logits_Rv = logits(x_SH[first : first + ROWS_AT_ONCE])
        target_ids_R = target_ids_S[first : first + ROWS_AT_ONCE]
        likeliest = exchange.likeliest(logits_Rv, max(num_top, 1))
        normalizer_R = exchange.log_normalizer(logits_Rv).double()
        values = (exchange.logits_of(logits_Rv, target_ids_R) - normalizer_R).tolist()
        top_values = (likeliest.logits_BC - normalizer_R.unsqueeze(1)).tolist()
        for value, ids, tops in zip(values, likeliest.token_ids_BC.tolist(), top_values, strict=True):
            yield TokenLogprobs(value, list(zip(ids, tops, strict=True)))


def _first(scored: TokenLogprobs, count: int) -> TokenLogprobs:
    return TokenLogprobs(scored.logprob, scored.top[:count])
