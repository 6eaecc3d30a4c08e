"""Block-128 e4m3 quantisation, as the published FP8 checkpoints have it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WeightView = Callable[[Tensor], Tensor]

TILE = 128
E4M3_MAX = 448.0


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the e4m3 weight and its bf16 `weight_scale_inv`, one a 128 x 128 tile; both sizes divide by 128."""
    rows, columns = weight.shape
    tiles = weight.float().reshape(rows // TILE, TILE, columns // TILE, TILE)
    scale = (tiles.abs().amax(dim=(1, 3)).clamp(min=1e-12) / E4M3_MAX).to(torch.bfloat16)
    # the rounded scale is what a reader multiplies by, so it is what we divide by
    scaled = (tiles / scale.float()[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.reshape(rows, columns).to(torch.float8_e4m3fn), scale


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """The float32 weight that the pair stands for."""
    return weight.float() * scale.float().repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)


def as_it_is(weight: Tensor) -> Tensor:
    """The weight itself: the view of ordinary training."""
    return weight


def fake_quantise(weight: Tensor) -> Tensor:
    """`weight` as it reads after quantisation, with the gradient passed straight through."""
    flat = weight.detach().reshape(-1, weight.shape[-1])
    rounded = dequantise(*quantise(flat)).reshape(weight.shape)
    return weight + (rounded - weight.detach())
