"""The network for training: qwen3_moe with a flat token axis, so that no padding is computed in linear layers.

Shapes: T tokens, R rows of one length group, L their length, H hidden, N query heads, G kv heads, D head_dim,
E experts, K experts per token, F ffn, V vocabulary, S tokens that carry loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocket_training.moe import Experts
from pocket_training.quantise import WeightView, as_it_is

MAX_TABLE = 2048


@dataclass(frozen=True, kw_only=True)
class PocketConfig:
    """The sizes of pocket."""

    vocab_size: int = 1024
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 128
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    intermediate_size: int = 512
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096


@dataclass(frozen=True)
class Group:
    """`rows` sequences of one padded length; `mask_R1LL` says who sees whom, where that is not simply the past."""

    rows: int
    length: int
    mask_R1LL: Tensor | None = None


@dataclass(frozen=True)
class FlatBatch:
    """Sequences laid end to end, group after group."""

    ids_T: Tensor
    positions_T: Tensor
    groups: list[Group]
    loss_rows_S: Tensor
    targets_S: Tensor


def rope_tables(config: PocketConfig, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [L, D], in the rotate-half layout of transformers."""
    inverse = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angles = torch.outer(torch.arange(length).float(), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def norm_and_rotate(x_TND: Tensor, weight_D: Tensor, cos_TD: Tensor, sin_TD: Tensor, eps: float) -> Tensor:
    """QK-norm, then RoPE."""
    x_TND = F.rms_norm(x_TND, (x_TND.shape[-1],), weight_D, eps)
    first, second = x_TND.chunk(2, dim=-1)
    return x_TND * cos_TD[:, None] + torch.cat([-second, first], dim=-1) * sin_TD[:, None]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


class Attention(nn.Module):
    """Grouped-query attention with QK-norm."""

    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        self.config = config
        self.q_size = config.num_heads * config.head_dim
        self.kv_size = config.num_kv_heads * config.head_dim
        self.qkv = nn.Parameter(torch.empty(self.q_size + 2 * self.kv_size, config.hidden_size))
        self.o_proj = nn.Parameter(torch.empty(config.hidden_size, self.q_size))
        self.q_norm = nn.Parameter(torch.ones(config.head_dim))
        self.k_norm = nn.Parameter(torch.ones(config.head_dim))
        self.view: WeightView = as_it_is
        self.norm_and_rotate: Callable[..., Tensor] = norm_and_rotate

    def output(self, mixed: Tensor) -> Tensor:
        """The output projection."""
        return F.linear(mixed, self.view(self.o_proj))

    def forward(self, x_TH: Tensor, batch: FlatBatch, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        """Mix within each sequence; returns heads side by side, before the output projection."""
        config = self.config
        q, k, v = torch.split(F.linear(x_TH, self.view(self.qkv)), [self.q_size, self.kv_size, self.kv_size], dim=-1)
        q_TND, k_TGD, v_TGD = (each.view(len(x_TH), -1, config.head_dim) for each in (q, k, v))
        q_TND = self.norm_and_rotate(q_TND, self.q_norm, cos_TD, sin_TD, config.rms_norm_eps)
        k_TGD = self.norm_and_rotate(k_TGD, self.k_norm, cos_TD, sin_TD, config.rms_norm_eps)
        mixed, start = [], 0
        for group in batch.groups:
            part = slice(start, start + group.rows * group.length)
            shape = (group.rows, group.length, -1, config.head_dim)
            heads = [each[part].view(shape).transpose(1, 2) for each in (q_TND, k_TGD, v_TGD)]
            repeat = config.num_heads // config.num_kv_heads
            k_rep, v_rep = (each.repeat_interleave(repeat, dim=1) for each in heads[1:])
            mask = group.mask_R1LL
            out = F.scaled_dot_product_attention(heads[0], k_rep, v_rep, attn_mask=mask, is_causal=mask is None)
            mixed.append(out.transpose(1, 2).reshape(part.stop - start, self.q_size))
            start = part.stop
        return torch.cat(mixed)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.post_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.attention = Attention(config)
        self.experts = Experts(
            config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok
        )
        self.rms_norm: Callable[..., Tensor] = rms_norm

    def forward(
        self, x_TH: Tensor, batch: FlatBatch, cos_TD: Tensor, sin_TD: Tensor, keep_S: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns hidden states (of rows `keep_S` only, where given) and the gate's balance loss."""
        mixed = self.attention(self.rms_norm(x_TH, self.input_norm, self.eps), batch, cos_TD, sin_TD)
        if keep_S is not None:
            mixed, x_TH = mixed.index_select(0, keep_S), x_TH.index_select(0, keep_S)
        x_TH = x_TH + self.attention.output(mixed)
        out, balance = self.experts(self.rms_norm(x_TH, self.post_norm, self.eps))
        return x_TH + out, balance


class Pocket(nn.Module):
    """The whole network."""

    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.cos: Tensor
        self.sin: Tensor
        cos, sin = rope_tables(config, MAX_TABLE)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset()

    @property
    def decoder(self) -> list[Layer]:
        """The layers, in order."""
        return cast("list[Layer]", list(self.layers))

    def reset(self) -> None:
        """Draw starting weights."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            if name.endswith(("o_proj", "down")):
                parameter.data.mul_(1 / math.sqrt(2 * self.config.num_layers))
        nn.init.normal_(self.embed, std=0.1)
        nn.init.normal_(self.lm_head, std=0.02)

    def set_view(self, view: WeightView) -> None:
        """Read every weight that export quantises through `view`."""
        for layer in self.decoder:
            layer.attention.view = layer.experts.view = view

    def compile_parts(self) -> None:
        """Fuse the element-wise parts: about a sixth off a training step on a CPU."""
        fused_rotate, fused_norm = (torch.compile(each, dynamic=True) for each in (norm_and_rotate, rms_norm))
        for layer in self.decoder:
            layer.attention.norm_and_rotate, layer.rms_norm = fused_rotate, fused_norm

    def forward(self, batch: FlatBatch) -> tuple[Tensor, Tensor]:
        """Logits [S, V] where the batch carries loss, and the mean balance loss of the gates."""
        x_TH = F.embedding(batch.ids_T, self.embed)
        cos_TD, sin_TD = self.cos[batch.positions_T], self.sin[batch.positions_T]
        balances = []
        for index, layer in enumerate(self.decoder):
            last = index == len(self.decoder) - 1
            x_TH, balance = layer(x_TH, batch, cos_TD, sin_TD, batch.loss_rows_S if last else None)
            balances.append(balance)
        x_SH = rms_norm(x_TH, self.norm, self.config.rms_norm_eps)
        return F.linear(x_SH, self.lm_head), torch.stack(balances).mean()
