"""Every kernel once more in the plainest torch: the oracle of the kernel tests, never used to serve."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dequantize_into(
    out_RC: Tensor, bits_RC: Tensor, scale_rc: Tensor, *, block: tuple[int, int], origin: tuple[int, int]
) -> None:
    values = bits_RC.view(torch.float8_e4m3fn).to(torch.float64)
    for row in range(out_RC.shape[0]):
        for col in range(out_RC.shape[1]):
            scale = scale_rc[(row + origin[0]) // block[0], (col + origin[1]) // block[1]]
            out_RC[row, col] = values[row, col] * scale


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    return (x_TI[:, None, :] * weight_OI[None, :, :]).sum(-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x_TND: Tensor, cos_T1D: Tensor, signed_sin_T1D: Tensor) -> Tensor:
    half = x_TND.shape[-1] // 2
    first, second = x_TND[..., :half], x_TND[..., half:]
    cos, sin = cos_T1D[..., half:], signed_sin_T1D[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def swiglu(gate_up_TX: Tensor) -> Tensor:
    half = gate_up_TX.shape[-1] // 2
    gate, up = gate_up_TX[..., :half], gate_up_TX[..., half:]
    return gate / (1 + torch.exp(-gate)) * up


def choose_experts(logits_TE: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    probs = logits_TE.exp() / logits_TE.exp().sum(-1, keepdim=True)
    ids = probs.argsort(dim=-1, descending=True)[:, :num_chosen]
    return ids, probs.gather(1, ids)


def choose_experts_normalized(logits_TE: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    ids, weights = choose_experts(logits_TE, num_chosen)
    return ids, weights / weights.sum(-1, keepdim=True)


def apply_experts(
    x_TH: Tensor, topk_ids_TK: Tensor, weights_TK: Tensor, gate_up_eXH: Tensor, down_eHF: Tensor, first_expert: int
) -> Tensor:
    out = torch.zeros_like(x_TH)
    for token, ids in enumerate(topk_ids_TK.tolist()):
        for k, expert in enumerate(ids):
            local = expert - first_expert
            if 0 <= local < gate_up_eXH.shape[0]:
                hidden = swiglu(gate_up_eXH[local] @ x_TH[token])
                out[token] += weights_TK[token, k] * (down_eHF[local] @ hidden)
    return out


def decode_attention(
    q_BND: Tensor, k_pool: Tensor, v_pool: Tensor, block_ids: Tensor, mask_B11S: Tensor | None
) -> Tensor:
    num_seqs, tables = q_BND.shape[0], block_ids.view(q_BND.shape[0], -1)
    rows = []
    for index in range(num_seqs):
        k_SGD, v_SGD = k_pool[tables[index]].flatten(0, 1), v_pool[tables[index]].flatten(0, 1)
        mask = torch.zeros(1, k_SGD.shape[0]) if mask_B11S is None else mask_B11S[index, 0]
        rows.append(_attend(q_BND[index : index + 1], k_SGD, v_SGD, mask))
    return torch.cat(rows)


def prefill_attention(
    q_CND: Tensor, k_pool: Tensor, v_pool: Tensor, block_ids: Tensor, num_keys: int, mask_CS: Tensor | None
) -> Tensor:
    k_SGD, v_SGD = k_pool[block_ids].flatten(0, 1)[:num_keys], v_pool[block_ids].flatten(0, 1)[:num_keys]
    if mask_CS is None:
        mask_CS = torch.full((q_CND.shape[0], num_keys), -math.inf).triu(1)
    return _attend(q_CND, k_SGD, v_SGD, mask_CS)


def _attend(q_CND: Tensor, k_SGD: Tensor, v_SGD: Tensor, mask_CS: Tensor) -> Tensor:
    group = q_CND.shape[1] // k_SGD.shape[1]
    heads = []
    for head in range(q_CND.shape[1]):
        k, v = k_SGD[:, head // group], v_SGD[:, head // group]
        scores = q_CND[:, head] @ k.T / math.sqrt(q_CND.shape[-1]) + mask_CS
        heads.append(torch.softmax(scores, dim=-1) @ v)
    return torch.stack(heads, dim=1)
