"""The GPU's ops once more in the plainest torch: the oracle of their tests and the yardstick of their bench.

Only what means something else on a GPU: quantised activations times e4m3 weights, fp32 sums, KV in its pool's dtype.
The others have their references in `workers.kernels.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels import reference
from workers.kernels.tiles import TileWeight
from workers.kernels.triton.rows import TILE, QuantizedRows

E4M3_MAX = 448.0
LEAST_LARGEST = 1e-12


def quantize(x_RI: Tensor) -> QuantizedRows:
    blocks_RkC = x_RI.float().unflatten(1, (-1, TILE))
    scale_Rk = blocks_RkC.abs().amax(dim=2).clamp(min=LEAST_LARGEST) / E4M3_MAX
    codes_RkC = (blocks_RkC / scale_Rk.unsqueeze(2)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return QuantizedRows(codes_RkC.flatten(1), scale_Rk, x_RI.dtype)


def linear(x: QuantizedRows, weight: TileWeight) -> Tensor:
    return (x.dense() @ weight.dense().t()).to(x.dtype)


def swiglu(gate_up_SRX: Tensor, dtype: torch.dtype) -> Tensor:
    return reference.swiglu(gate_up_SRX.float().sum(0)).to(dtype)


def apply_experts(
    x_TH: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    gate_up_eXH: Tensor | TileWeight,
    down_eHF: Tensor | TileWeight,
    first_slot: int,
    loads_e: Tensor | None = None,
    _quantized: QuantizedRows | None = None,
) -> Tensor:
    """Expert by expert; of e4m3 weights on rows that are quantised here."""
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    for local in range(gate_up_eXH.shape[0]):
        token_R, choice_R = (slots_TK == first_slot + local).nonzero(as_tuple=True)
        if loads_e is not None:
            loads_e[local] += len(token_R)
        hidden_RF = reference.swiglu(_product(x_TH[token_R], gate_up_eXH, local))
        y_RH = _product(hidden_RF, down_eHF, local)
        out_TH.index_add_(0, token_R, y_RH * weights_TK[token_R, choice_R].float().unsqueeze(1))
    return out_TH.to(x_TH.dtype)


def _product(x_RI: Tensor, weight_eOI: Tensor | TileWeight, expert: int) -> Tensor:
    if isinstance(weight_eOI, Tensor):
        return x_RI.float() @ weight_eOI[expert].float().t()
    return quantize(x_RI).dense() @ weight_eOI.dense()[expert].t()


def decode_attention(q_BND: Tensor, pool: Tensor, tables_BM: Tensor, num_keys_B: Tensor) -> Tensor:
    rows = [
        chunk_attention(q_ND[None], pool, table_M, num_keys - 1)
        for q_ND, table_M, num_keys in zip(q_BND, tables_BM, num_keys_B.tolist(), strict=True)
    ]
    return torch.cat(rows)


def chunk_attention(q_CND: Tensor, pool: Tensor, block_ids: Tensor, start: int) -> Tensor:
    """In fp32 over KV as it is stored."""
    (size, num_heads, head_dim), num_kv_heads = q_CND.shape, pool.shape[0] // 2
    kv_XSD = pool[:, block_ids].flatten(1, 2)[:, : start + size].float()
    kv_XSD = kv_XSD.repeat_interleave(num_heads // num_kv_heads, dim=0)
    scores_NCS = q_CND.float().transpose(0, 1) @ kv_XSD[:num_heads].mT / head_dim**0.5
    is_hidden_CS = torch.ones(size, start + size, dtype=torch.bool, device=q_CND.device).triu(start + 1)
    weights_NCS = scores_NCS.masked_fill(is_hidden_CS, -torch.inf).softmax(dim=-1)
    out_CND: Tensor = (weights_NCS @ kv_XSD[num_heads:]).transpose(0, 1)
    return out_CND.to(q_CND.dtype)
