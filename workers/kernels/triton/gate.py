"""Choice of experts: as many passes of an argmax as there are choices, over a row's logits in registers.

Where experts move or have replicas, their slots are looked up on the way. T tokens, E experts, K chosen, R replicas of
an expert at most. How many chose each expert comes out of `route`, which counts anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.triton.numerics import cast


def choose_experts(logits_TE: Tensor, num_chosen: int, *, is_normalized: bool) -> tuple[Tensor, Tensor]:
    """(topk_ids_TK, weights_TK), likeliest first, of equals the lowest id; weights in the logits' dtype."""
    return _choose_in(logits_TE, num_chosen, None, None, is_normalized)


def choose_slots(
    logits_TE: Tensor, num_chosen: int, slots_ER: Tensor, counts_E: Tensor, *, is_normalized: bool
) -> tuple[Tensor, Tensor]:
    """The same with the experts' slots in place of their ids: token t takes replica t of each, round and round."""
    return _choose_in(logits_TE, num_chosen, slots_ER, counts_E, is_normalized)


def _choose_in(
    logits_TE: Tensor, num_chosen: int, slots_ER: Tensor | None, counts_E: Tensor | None, is_normalized: bool
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    topk_ids_TK = torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(num_tokens, num_chosen, dtype=logits_TE.dtype, device=logits_TE.device)
    if num_tokens:
        _choose[(num_tokens,)](
            *(logits_TE, logits_TE.stride(0), topk_ids_TK, weights_TK, num_experts),
            *(slots_ER, counts_E, 0 if slots_ER is None else slots_ER.shape[1]),
            *(num_chosen, triton.next_power_of_2(num_chosen), triton.next_power_of_2(num_experts), is_normalized),
            num_warps=1,
        )
    return topk_ids_TK, weights_TK


@triton.jit
def _choose(
    logits_ptr,
    logits_stride,
    ids_ptr,
    weights_ptr,
    num_experts,
    slots_ptr,
    counts_ptr,
    REPLICAS: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
    NORMALIZES: tl.constexpr,
):
    token, expert_E, choice_K = tl.program_id(0).to(tl.int64), tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    is_expert_E = expert_E < num_experts
    logit_E = tl.load(logits_ptr + token * logits_stride + expert_E, mask=is_expert_E, other=-float("inf"))
    logit_E = logit_E.to(tl.float32)
    largest = tl.max(logit_E, axis=0)
    total = tl.sum(tl.exp(logit_E - largest), axis=0)
    id_K, weight_K = tl.zeros((CHOICES,), tl.int32), tl.zeros((CHOICES,), tl.float32)
    is_left_E = is_expert_E
    for choice in tl.static_range(TOP_K):
        best = tl.max(tl.where(is_left_E, logit_E, -float("inf")), axis=0)
        # Where logits are no numbers none equals the best: an id that is none must not reach a load.
        chosen = tl.min(tl.where(is_left_E & (logit_E == best), expert_E, num_experts - 1), axis=0)
        is_left_E = is_left_E & (expert_E != chosen)
        id_K = tl.where(choice_K == choice, chosen, id_K)
        weight_K = tl.where(choice_K == choice, tl.exp(best - largest), weight_K)
    weight_K = weight_K / (tl.sum(weight_K, axis=0) if NORMALIZES else total)
    if REPLICAS == 1:
        id_K = tl.load(slots_ptr + id_K)
    elif REPLICAS > 1:
        id_K = tl.load(slots_ptr + id_K * REPLICAS + token % tl.load(counts_ptr + id_K))
    tl.store(ids_ptr + token * TOP_K + choice_K, id_K.to(tl.int64), mask=choice_K < TOP_K)
    tl.store(
        weights_ptr + token * TOP_K + choice_K, cast(weight_K, weights_ptr.dtype.element_ty), mask=choice_K < TOP_K
    )
