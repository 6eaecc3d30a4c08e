"""Every kernel once more in the plainest torch: the oracle of the kernel tests, never used to serve."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.kernels.decode_attention import PagedKeys
from workers.kernels.prefill_attention import Chunks


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


def qk_norm_rope_store(
    heads_TXD: Tensor,
    norms_YD: Tensor,
    eps: float,
    rotations_T2D: Tensor,
    pool: Tensor | None,
    cells_T: Tensor | None,
) -> None:
    half = heads_TXD.shape[-1] // 2
    for token in range(len(heads_TXD)):
        cos, sin = rotations_T2D[token, 0, half:], rotations_T2D[token, 1, half:]
        for head, norm in enumerate(norms_YD):
            normed = rms_norm(heads_TXD[token, head], norm, eps)
            first, second = normed[:half], normed[half:]
            heads_TXD[token, head] = torch.cat([first * cos - second * sin, second * cos + first * sin])
        if pool is not None and cells_T is not None:
            block, offset = divmod(int(cells_T[token]), pool.shape[2])
            pool[:, block, offset] = heads_TXD[token, -len(pool) :]


def swiglu(gate_up_TX: Tensor) -> Tensor:
    half = gate_up_TX.shape[-1] // 2
    gate, up = gate_up_TX[..., :half], gate_up_TX[..., half:]
    return gate / (1 + torch.exp(-gate)) * up


def choose_experts(logits_TE: Tensor, num_chosen: int, *, is_normalized: bool) -> tuple[Tensor, Tensor]:
    probs = logits_TE.exp() / logits_TE.exp().sum(-1, keepdim=True)
    ids = probs.argsort(dim=-1, descending=True)[:, :num_chosen]
    weights = probs.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) if is_normalized else weights


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


def decode_attention(q_BND: Tensor, pool: Tensor, keys: PagedKeys) -> Tensor:
    rows = []
    for q_ND, table, num_keys in zip(q_BND, keys.tables_BM, keys.num_keys_B.tolist(), strict=True):
        rows.append(_attend(q_ND[None], _sequence(pool, table, num_keys), torch.zeros(1, num_keys)))
    return torch.cat(rows)


def prefill_attention(q_TND: Tensor, pool: Tensor, chunks: Chunks) -> Tensor:
    outs, starts, sizes = [], chunks.starts.tolist(), chunks.sizes.tolist()
    for q_CND, table, start, size in zip(torch.split(q_TND, sizes), chunks.tables_CM, starts, sizes, strict=True):
        mask_CS = torch.full((size, start + size), -math.inf).triu(start + 1)
        outs.append(_attend(q_CND, _sequence(pool, table, start + size), mask_CS))
    return torch.cat(outs)


def _sequence(pool: Tensor, block_ids: Tensor, num_keys: int) -> Tensor:
    """[S, 2G, D]"""
    cells = [pool[:, block, offset] for block in block_ids.tolist() for offset in range(pool.shape[2])]
    return torch.stack(cells[:num_keys])


def _attend(q_CND: Tensor, kv_SXD: Tensor, mask_CS: Tensor) -> Tensor:
    num_kv_heads = kv_SXD.shape[1] // 2
    group = q_CND.shape[1] // num_kv_heads
    heads = []
    for head in range(q_CND.shape[1]):
        k, v = kv_SXD[:, head // group], kv_SXD[:, num_kv_heads + head // group]
        scores = q_CND[:, head] @ k.T / math.sqrt(q_CND.shape[-1]) + mask_CS
        heads.append(torch.softmax(scores, dim=-1) @ v)
    return torch.stack(heads, dim=1)
