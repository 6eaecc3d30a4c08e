"""Half a layer in one call, where its weights are panels, or all layers: the same kernels as one by one, the same bits.

A decode step of one stream is 25 ms of reading weights in the 0.6B shape; a call and a tensor for each kernel of each
layer took 5 ms beside it, since the weights that pass drive Python's own memory out of the caches. T tokens, H hidden.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from workers.kernels.cpu.library import VALUE_KINDS, native
from workers.kernels.cpu.panels import PanelWeight
from workers.kernels.decode_attention import PagedKeys
from workers.kernels.linear import Weight
from workers.kernels.prefill_attention import Chunks

_pointer, _int = ctypes.c_void_p, ctypes.c_int64


class _Attention(ctypes.Structure):
    """`AttentionHalf` of native/halves.cpp."""

    _fields_ = (
        ("norm", _pointer),
        ("head_norms", _pointer),
        ("qkv", _pointer),
        ("o", _pointer),
        ("num_heads", _int),
        ("num_kv_heads", _int),
        ("head_dim", _int),
        ("eps", ctypes.c_float),
    )


class _FeedForward(ctypes.Structure):
    """`FeedForwardHalf` of native/halves.cpp."""

    _fields_ = (
        ("norm", _pointer),
        ("gate", _pointer),
        ("gate_up", _pointer),
        ("down", _pointer),
        ("num_chosen", _int),
        ("eps", ctypes.c_float),
        ("is_normalized", ctypes.c_int32),
    )


class _Rows(ctypes.Structure):
    """`StepRows` of native/halves.cpp."""

    _fields_ = (
        ("num_chunks", _int),
        ("num_known", _int),
        ("num_singles", _int),
        ("rotations", _pointer),
        ("cells", _pointer),
        ("starts", _pointer),
        ("sizes", _pointer),
        ("chunk_tables", _pointer),
        ("chunk_stride", _int),
        ("tables", _pointer),
        ("num_keys", _pointer),
        ("table_stride", _int),
        ("num_cells", _int),
        ("block_size", _int),
    )


class _Layer(ctypes.Structure):
    """`LayerHalves` of native/halves.cpp."""

    _fields_ = (("attention", _pointer), ("feed_forward", _pointer), ("pool", _pointer), ("pool_kind", _int))


class StepRows:
    """The rows of one step as the calls read them, for all layers alike."""

    def __init__(
        self,
        rotations_T2D: Tensor,
        cells_T: Tensor,
        chunks: Chunks | None,
        keys: PagedKeys | None,
        *,
        num_blocks: int,
        block_size: int,
    ) -> None:
        self._kept = (rotations_T2D, cells_T, chunks, keys)  # what the addresses below point into
        num_singles = 0 if keys is None else len(keys.num_keys_B)
        rows = _Rows(
            num_known=len(cells_T) - num_singles,
            num_singles=num_singles,
            rotations=rotations_T2D.data_ptr(),
            cells=cells_T.data_ptr(),
            num_cells=num_blocks * block_size,
            block_size=block_size,
        )
        if chunks is not None:
            rows.num_chunks, rows.chunk_tables = len(chunks.sizes), chunks.tables_CM.data_ptr()
            rows.chunk_stride = chunks.tables_CM.stride(0)
            rows.starts, rows.sizes = chunks.starts.ctypes.data, chunks.sizes.ctypes.data
        if keys is not None:
            rows.tables, rows.num_keys = keys.tables_BM.data_ptr(), keys.num_keys_B.data_ptr()
            rows.table_stride = keys.tables_BM.stride(0)
        self._rows = rows
        self.address = ctypes.addressof(rows)


class AttentionHalf:
    """From the residual to the output projection."""

    def __init__(
        self, norm_H: Tensor, qkv: PanelWeight, norms_YD: Tensor, o: PanelWeight, num_heads: int, eps: float
    ) -> None:
        library = native()
        assert library is not None, "panels exist only where there are kernels to read them"
        self._call = library.mull_attention_half
        self._kept = (norm_H, qkv, norms_YD, o)
        addresses = (norm_H.data_ptr(), norms_YD.data_ptr(), qkv.address, o.address)
        num_kv_heads, head_dim = len(norms_YD) - num_heads, norms_YD.shape[1]
        self._layer = _Attention(*addresses, num_heads, num_kv_heads, head_dim, eps)
        self.address = ctypes.addressof(self._layer)

    def __call__(self, x_TH: Tensor, delta_TH: Tensor | None, rows: StepRows, pool: Tensor) -> Tensor:
        """Add `delta_TH` to `x_TH` in place, attend, and store K and V in the pool."""
        out_TH = torch.empty_like(x_TH)
        delta = None if delta_TH is None else delta_TH.data_ptr()
        addresses = (x_TH.data_ptr(), delta, self.address, rows.address, pool.data_ptr())
        self._call(*addresses, VALUE_KINDS[pool.dtype], out_TH.data_ptr())
        return out_TH


class FeedForwardHalf:
    """From the residual to the sum of a dense layer, or of all experts; those must all be here, in their order."""

    def __init__(
        self,
        norm_H: Tensor,
        gate_up: PanelWeight,
        down: PanelWeight,
        eps: float,
        gate: PanelWeight | None = None,
        num_chosen: int = 0,
        *,
        is_normalized: bool = False,
    ) -> None:
        library = native()
        assert library is not None, "panels exist only where there are kernels to read them"
        self._call = library.mull_feed_forward_half
        self._kept = (norm_H, gate, gate_up, down)
        addresses = (norm_H.data_ptr(), None if gate is None else gate.address, gate_up.address, down.address)
        self._layer = _FeedForward(*addresses, num_chosen, eps, int(is_normalized))
        self.address = ctypes.addressof(self._layer)

    def __call__(self, x_TH: Tensor, delta_TH: Tensor) -> Tensor:
        """Add `delta_TH` to `x_TH` in place and apply the layer to its norm."""
        out_TH = torch.empty_like(x_TH)
        self._call(x_TH.data_ptr(), delta_TH.data_ptr(), len(x_TH), self.address, out_TH.data_ptr())
        return out_TH


class LayerStack:
    """Layers one after another, where no rank has to be heard between them."""

    def __init__(self, halves: list[tuple[AttentionHalf, FeedForwardHalf]]) -> None:
        library = native()
        assert library is not None, "halves exist only where there are kernels to call"
        self._call = library.mull_layers
        self._kept = halves
        self._layers = (_Layer * len(halves))()
        for layer, (attention, feed_forward) in zip(self._layers, halves, strict=True):
            layer.attention, layer.feed_forward = attention.address, feed_forward.address

    def __call__(self, x_TH: Tensor, rows: StepRows, pools: list[Tensor], num_layers: int) -> Tensor:
        """Put `x_TH`, changed in place, through the first layers. Returns what is still to be added to it."""
        for layer, pool in zip(self._layers, pools, strict=True):
            layer.pool, layer.pool_kind = pool.data_ptr(), VALUE_KINDS[pool.dtype]
        delta_TH = torch.empty_like(x_TH)
        self._call(x_TH.data_ptr(), self._layers, num_layers, rows.address, delta_TH.data_ptr())
        return delta_TH


def panels(*weights: Weight) -> tuple[PanelWeight, ...] | None:
    """The weights, where all of them are panels."""
    found = tuple(weight for weight in weights if isinstance(weight, PanelWeight))
    return found if len(found) == len(weights) else None
