"""Choice of experts: the k likeliest of a token and their weights."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_experts(logits_TE: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """(topk_ids_TK, weights_TK): softmax over all experts, then the likeliest."""
    weights_TK, topk_ids_TK = torch.softmax(logits_TE, dim=-1, dtype=torch.float32).topk(num_chosen, dim=-1)
    return topk_ids_TK, weights_TK.to(logits_TE.dtype)


def choose_experts_normalized(logits_TE: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """The same with weights that sum to one: a softmax over the chosen logits alone."""
    top_TK, topk_ids_TK = logits_TE.topk(num_chosen, dim=-1)
    return topk_ids_TK, torch.softmax(top_TK, dim=-1, dtype=torch.float32).to(logits_TE.dtype)
