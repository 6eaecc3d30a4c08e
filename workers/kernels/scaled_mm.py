"""torch's own product of FP8 rows and a weight in tiles, for prompts on Hopper: cuBLAS, where there is no DeepGEMM.

It takes a wrong layout of scales without a word and answers wrongly: it is asked once whether it computes what the
numbers stand for, and never again where it does not. Scales of rows lie side by side, for a multiple of four rows;
those of a weight column by column, for a multiple of four tiles of inputs. R rows, O outputs, I inputs, o and k tiles.
"""

from __future__ import annotations

import functools
import logging
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.invariance import is_invariant
from workers.kernels.optional import HOPPER
from workers.kernels.tiles import TILE, TileWeight
from workers.kernels.triton.choice import CHOICE_VARIABLE
from workers.kernels.triton.rows import QuantizedRows

log = logging.getLogger(__name__)

MIN_ROWS = 256
"""As of DeepGEMM's."""
OUTPUT_MULTIPLE = 16
TILES_MULTIPLE = 4
RECIPES = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
LARGEST_ERROR = 0.01
"""By the largest value: its answers are rounded to bf16."""


def is_chosen(x: QuantizedRows, weight: TileWeight) -> bool:
    """Whether it is for this product: it fits, it is right, and no bit has to be that of a decode."""
    num_outputs, size_in = weight.shape
    fits = num_outputs % OUTPUT_MULTIPLE == 0 and size_in % TILE == 0 and x.dtype == torch.bfloat16
    return len(x.codes_RI) >= MIN_ROWS and fits and not is_invariant() and _is_right(x.codes_RI.device)


def linear(x: QuantizedRows, weight: TileWeight) -> Tensor:
    """x @ weight.T, [R, O], in bf16."""
    codes_RI, scale_Rk = x.padded()
    scale_ok = F.pad(weight.scale_ok, (0, -weight.scale_ok.shape[1] % TILES_MULTIPLE))
    out: Tensor = F.scaled_mm(codes_RI, weight.codes_OI.t(), scale_Rk, RECIPES[0], scale_ok.t(), RECIPES[1])
    return out[: len(x.codes_RI)]


@functools.cache
def _is_right(device: torch.device) -> bool:
    """Asked before anything is recorded: warming up comes first."""
    if os.environ.get(CHOICE_VARIABLE, "") or not torch.cuda.is_available():
        return False
    if torch.cuda.get_device_capability() != HOPPER:
        return False
    x, weight = _example(device)
    try:
        got, want = linear(x, weight).float(), x.dense() @ weight.dense().t()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # compiled for another CUDA
        log.info(
            "GPU kernels: torch has no FP8 product of tiles here (%s); ours compute", str(error).partition("\n")[0]
        )
        return False
    is_right = bool((got - want).abs().max() <= LARGEST_ERROR * want.abs().max())
    if not is_right:
        log.warning("GPU kernels: torch's FP8 product of tiles is wrong here; ours compute in its place")
    return is_right


def _example(device: torch.device) -> tuple[QuantizedRows, TileWeight]:
    """No two scales alike, and sizes of which no two could be taken for one another."""
    generator, (rows, outputs, size_in) = torch.Generator().manual_seed(0), (MIN_ROWS + 1, 384, 640)
    x = QuantizedRows.empty(rows, size_in, torch.bfloat16, device)
    x.codes_RI.copy_(torch.randn(rows, size_in, generator=generator).to(torch.float8_e4m3fn))
    x.scale_Rk.copy_(torch.rand(rows, size_in // TILE, generator=generator) + 0.1)
    codes = torch.randn(outputs, size_in, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(outputs // TILE, size_in // TILE, generator=generator) + 0.1
    return x, TileWeight(codes.to(device), scale.to(device), outputs)
