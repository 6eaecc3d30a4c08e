"""Choice of experts: the k likeliest of a token, where they lie, and their weights.

T tokens, E experts, K chosen experts per token, R replicas of an expert at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from workers.kernels.cpu.library import native
from workers.kernels.triton.choice import has_triton


class Replicas(NamedTuple):
    """The physical slots of each expert."""

    slots_ER: Tensor
    """Round and round to the end of the row."""
    counts_E: Tensor
    """How many differ."""


def choose_slots(
    logits_TE: Tensor, num_chosen: int, replicas: Replicas, *, is_normalized: bool
) -> tuple[Tensor, Tensor]:
    """As `choose_experts`, but the experts' slots; neighbouring tokens take different replicas."""
    if has_triton(logits_TE.device.type):
        from workers.kernels.triton import gate

        return gate.choose_slots(logits_TE, num_chosen, *replicas, is_normalized=is_normalized)
    topk_ids_TK, weights_TK = choose_experts(logits_TE, num_chosen, is_normalized=is_normalized)
    return slots_of_chosen(topk_ids_TK, replicas), weights_TK


def slots_of_chosen(topk_ids_TK: Tensor, replicas: Replicas) -> Tensor:
    """Physical slots, [T, K]."""
    slots_ER, counts_E = replicas
    if slots_ER.shape[1] == 1:
        return slots_ER[:, 0][topk_ids_TK]
    rows_T1 = torch.arange(len(topk_ids_TK), device=topk_ids_TK.device).unsqueeze(1)
    return slots_ER[topk_ids_TK, rows_T1 % counts_E[topk_ids_TK]]


def choose_experts(logits_TE: Tensor, num_chosen: int, *, is_normalized: bool) -> tuple[Tensor, Tensor]:
    """(topk_ids_TK, weights_TK), likeliest first, of equals the lowest id.

    Weights are a softmax over all experts, or, normalized, over the chosen ones, so that they sum to one.
    """
    library = native() if logits_TE.device.type == "cpu" else None
    if library is not None:
        num_tokens, num_experts = logits_TE.shape
        topk_ids_TK = torch.empty(num_tokens, num_chosen, dtype=torch.int64)
        weights_TK = torch.empty(num_tokens, num_chosen)
        library.mull_choose_experts(
            *(logits_TE.data_ptr(), logits_TE.stride(0), num_tokens, num_experts, num_chosen, is_normalized),
            *(topk_ids_TK.data_ptr(), weights_TK.data_ptr()),
        )
        return topk_ids_TK, weights_TK
    if has_triton(logits_TE.device.type):
        from workers.kernels.triton import gate

        return gate.choose_experts(logits_TE, num_chosen, is_normalized=is_normalized)
    if is_normalized:
        top_TK, topk_ids_TK = logits_TE.topk(num_chosen, dim=-1)
        weights_TK = torch.softmax(top_TK, dim=-1, dtype=torch.float32)
    else:
        weights_TK, topk_ids_TK = torch.softmax(logits_TE, dim=-1, dtype=torch.float32).topk(num_chosen, dim=-1)
    return topk_ids_TK, weights_TK.to(logits_TE.dtype)
