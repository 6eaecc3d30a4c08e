"""This rank's experts applied to the tokens that chose them.

T tokens, H hidden, K chosen experts per token, E experts, e local experts, F ffn, R (token, expert) pairs that are
local, I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.kernels.cpu.library import native
from workers.kernels.cpu.panels import PanelWeight
from workers.kernels.linear import Weight, linear
from workers.kernels.swiglu import swiglu
from workers.kernels.tiles import TileWeight
from workers.kernels.triton.choice import has_triton
from workers.kernels.triton.rows import QuantizedRows


def apply_experts(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_eXH: Weight,
    down_eHF: Weight,
    first_expert: int,
    loads_e: Tensor | None = None,
    quantized: QuantizedRows | None = None,
) -> Tensor:
    """Sum over each token's local experts of weight * expert(x); in the order of its choices; zeros where it has none.

    `loads_e`, int64: the number of tokens of each local expert is added to it, on a GPU by the kernel that sorts them.
    `quantized`: x_TH as tiles are multiplied with, where somebody has made it already.
    In torch a lone token walks its experts: sorting would cost as much as computing.
    """
    is_triton = has_triton(x_TH.device.type) and not isinstance(gate_up_eXH, PanelWeight)
    if loads_e is not None and not is_triton:
        _count(topk_ids_TK, first_expert, loads_e)
    if isinstance(gate_up_eXH, PanelWeight):
        assert isinstance(down_eHF, PanelWeight), "one reader makes both, in the same form"
        return _panel_experts(x_TH, topk_ids_TK, weights_TK, gate_up_eXH, down_eHF, first_expert)
    assert not isinstance(down_eHF, PanelWeight), "one reader makes both, in the same form"
    if is_triton:
        from workers.kernels.triton import experts

        return experts.apply_experts(
            x_TH, topk_ids_TK, weights_TK, gate_up_eXH, down_eHF, first_expert, loads_e, quantized
        )
    assert not isinstance(gate_up_eXH, TileWeight), "tiles exist only where there are kernels to read them"
    assert not isinstance(down_eHF, TileWeight), "tiles exist only where there are kernels to read them"
    if x_TH.shape[0] == 1:
        return _one_token(x_TH, topk_ids_TK, weights_TK, gate_up_eXH, down_eHF, first_expert)
    return _grouped(x_TH, topk_ids_TK, weights_TK, gate_up_eXH, down_eHF, first_expert)


def _count(topk_ids_TK: Tensor, first_expert: int, loads_e: Tensor) -> None:
    local = topk_ids_TK.flatten() - first_expert
    is_here = (local >= 0) & (local < len(loads_e))
    loads_e.index_add_(0, local.clamp(0, len(loads_e) - 1), is_here.long())


def _panel_experts(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_eXH: PanelWeight,
    down_eHF: PanelWeight,
    first_expert: int,
) -> Tensor:
    library = native()
    assert library is not None, "panels exist only where there are kernels to read them"
    x_TH, topk_ids_TK, weights_TK = x_TH.contiguous(), topk_ids_TK.contiguous(), weights_TK.contiguous()
    num_tokens, hidden = x_TH.shape
    out_TH = torch.empty(num_tokens, hidden)
    library.mull_experts(
        *(x_TH.data_ptr(), hidden, num_tokens, topk_ids_TK.data_ptr(), weights_TK.data_ptr(), topk_ids_TK.shape[1]),
        *(gate_up_eXH.address, down_eHF.address, first_expert, out_TH.data_ptr()),
    )
    return out_TH


def _one_token(
    x_1H: Tensor, topk_ids_1K: Tensor, weights_1K: Tensor, gate_up_eXH: Tensor, down_eHF: Tensor, first_expert: int
) -> Tensor:
    out_1H = torch.zeros_like(x_1H)
    for expert_id, weight in zip(topk_ids_1K[0].tolist(), weights_1K[0].tolist(), strict=True):
        local = expert_id - first_expert
        if 0 <= local < gate_up_eXH.shape[0]:
            out_1H.add_(linear(swiglu(linear(x_1H, gate_up_eXH[local])), down_eHF[local]).mul_(weight))
    return out_1H


def _grouped(
    x_TH: Tensor, topk_ids_TK: Tensor, weights_TK: Tensor, gate_up_eXH: Tensor, down_eHF: Tensor, first_expert: int
) -> Tensor:
    num_local, top_k = gate_up_eXH.shape[0], topk_ids_TK.shape[1]
    ids = topk_ids_TK.flatten()
    counts_E = ids.bincount(minlength=first_expert + num_local).tolist()
    counts_e = counts_E[first_expert : first_expert + num_local]
    start = sum(counts_E[:first_expert])
    order_R = ids.argsort(stable=True)[start : start + sum(counts_e)]
    token_R = order_R.div(top_k, rounding_mode="floor")
    gate_up_RX = _each_expert(x_TH.index_select(0, token_R), gate_up_eXH, counts_e)
    y_RH = _each_expert(swiglu(gate_up_RX), down_eHF, counts_e)
    y_RH.mul_(weights_TK.reshape(-1).index_select(0, order_R).unsqueeze(1))
    in_k_order_R = order_R.argsort()
    rows, tokens = y_RH.index_select(0, in_k_order_R), token_R.index_select(0, in_k_order_R)
    return torch.zeros_like(x_TH).index_add_(0, tokens, rows)


def _each_expert(x_RI: Tensor, weight_eOI: Tensor, counts_e: list[int]) -> Tensor:
    """Each expert's rows, one after another, times its weight: [R, O]."""
    out_RO = x_RI.new_empty(x_RI.shape[0], weight_eOI.shape[1])
    for x, weight_IO, out in zip(
        torch.split(x_RI, counts_e), weight_eOI.mT, torch.split(out_RO, counts_e), strict=True
    ):
        if len(x):
            torch.mm(x, weight_IO, out=out)
    return out_RO
