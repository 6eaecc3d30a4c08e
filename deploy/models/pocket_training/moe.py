"""The mixture-of-experts layer for training: tokens sorted by expert, one small matmul an expert.

Shapes: T tokens, H hidden, E experts, K experts per token, F ffn, R = T x K rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocket_training.quantise import WeightView, as_it_is


class Experts(nn.Module):
    """Gate and experts of one layer; the chosen experts' weights are normalised to sum to one."""

    def __init__(self, hidden_size: int, ffn_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * ffn_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_size))
        self.view: WeightView = as_it_is

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the experts' weighted sum and the balance loss (after Switch Transformers, 1.0 when even)."""
        num_experts = self.gate.shape[0]
        probs_TE = F.linear(x_TH, self.gate).softmax(dim=-1)
        weights_TK, chosen_TK = probs_TE.topk(self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        order_R = chosen_TK.flatten().argsort(stable=True)
        counts_E = torch.bincount(chosen_TK.flatten(), minlength=num_experts)
        rows_RH = x_TH.index_select(0, order_R // self.top_k)
        gate_up, down = self.view(self.gate_up), self.view(self.down)
        outs = []
        for expert, rows in enumerate(torch.split(rows_RH, counts_E.tolist())):
            gate, up = F.linear(rows, gate_up[expert]).chunk(2, dim=-1)
            outs.append(F.linear(F.silu(gate) * up, down[expert]))
        place_R = torch.empty_like(order_R)
        place_R[order_R] = torch.arange(len(order_R))
        out_TKH = torch.cat(outs).index_select(0, place_R).view(len(x_TH), self.top_k, -1)
        share_E = counts_E / counts_E.sum()
        balance: Tensor = num_experts * (share_E * probs_TE.mean(dim=0)).sum()
        out_TH: Tensor = (out_TKH * weights_TK[..., None]).sum(dim=1)
        return out_TH, balance
