"""Tokens on their way to the experts, as rows of bytes: one buffer holds a token, its slots and their weights.

gloo has no FP8 and one collective is faster than three, so everything travels as uint8. T tokens, R rows, H hidden,
K slots per token, b blocks of a row, P bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_BLOCK = 128
"""Columns of a row that share a scale, as the FP8 kernels quantise activations."""
E4M3_MAX = 448.0
LEAST_LARGEST = 1e-12
"""Keeps the scale of a block of zeros from being zero."""
SLOT_BYTES, WEIGHT_BYTES, SCALE_BYTES = 4, 4, 4


@dataclass(frozen=True)
class RoutedRows:
    """Tokens, and the physical slots of the experts that they chose with their weights."""

    x_RH: Tensor
    slots_RK: Tensor
    weights_RK: Tensor

    @classmethod
    def none(cls, x_0H: Tensor, num_chosen: int) -> RoutedRows:
        slots_0K = torch.empty(0, num_chosen, dtype=torch.int64, device=x_0H.device)
        return cls(x_0H, slots_0K, x_0H.new_empty(0, num_chosen))


@dataclass(frozen=True)
class ExactRows:
    """Every bit: what arrives is what was sent."""

    hidden_size: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    def write(self, x_RH: Tensor) -> Tensor:
        return x_RH.contiguous().view(torch.uint8)

    def read(self, bytes_RP: Tensor) -> Tensor:
        return bytes_RP.contiguous().view(self.dtype)


@dataclass(frozen=True)
class Fp8Rows:
    """e4m3 with one fp32 scale per 128 columns: a quarter of fp32's bytes, half of bf16's.

    An element is off by at most 1/16 of its size, or by 2**-18 of its block's largest where it is tiny.
    """

    hidden_size: int
    dtype: torch.dtype

    @property
    def num_blocks(self) -> int:
        return -(-self.hidden_size // FP8_BLOCK)

    @property
    def row_bytes(self) -> int:
        return self.num_blocks * (FP8_BLOCK + SCALE_BYTES)

    def write(self, x_RH: Tensor) -> Tensor:
        padded = F.pad(x_RH.float(), (0, self.num_blocks * FP8_BLOCK - self.hidden_size))
        blocks_RbC = padded.view(-1, self.num_blocks, FP8_BLOCK)
        scales_Rb1 = blocks_RbC.abs().amax(dim=2, keepdim=True).clamp(min=LEAST_LARGEST) / E4M3_MAX
        values_RbC = (blocks_RbC / scales_Rb1).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return torch.cat([values_RbC.view(torch.uint8).flatten(1), scales_Rb1.flatten(1).view(torch.uint8)], dim=1)

    def read(self, bytes_RP: Tensor) -> Tensor:
        size = self.num_blocks * FP8_BLOCK
        values_RC = bytes_RP[:, :size].contiguous().view(torch.float8_e4m3fn).float()
        scales_Rb1 = bytes_RP[:, size:].contiguous().view(torch.float32).unsqueeze(2)
        x_RbC = values_RC.view(-1, self.num_blocks, FP8_BLOCK) * scales_Rb1
        return x_RbC.flatten(1)[:, : self.hidden_size].to(self.dtype)


@dataclass(frozen=True)
class RowPacker:
    """Packs tokens of one shape and type; the receiver's like packer reads them."""

    format: ExactRows | Fp8Rows
    num_chosen: int

    @property
    def row_bytes(self) -> int:
        return self.format.row_bytes + self.num_chosen * (SLOT_BYTES + WEIGHT_BYTES)

    def pack(self, rows: RoutedRows) -> Tensor:
        """uint8, [R, row_bytes]"""
        slots, weights = rows.slots_RK.to(torch.int32), rows.weights_RK.to(torch.float32)
        hidden = self.format.write(rows.x_RH)
        return torch.cat([hidden, slots.view(torch.uint8), weights.contiguous().view(torch.uint8)], dim=1)

    def unpack(self, packed_RP: Tensor) -> RoutedRows:
        sizes = [self.format.row_bytes, self.num_chosen * SLOT_BYTES, self.num_chosen * WEIGHT_BYTES]
        hidden, slots, weights = torch.split(packed_RP, sizes, dim=1)
        return RoutedRows(
            self.format.read(hidden),
            slots.contiguous().view(torch.int32).long(),
            weights.contiguous().view(torch.float32).to(self.format.dtype),
        )
