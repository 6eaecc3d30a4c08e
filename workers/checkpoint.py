"""Reads one rank's part of a checkpoint: only its bytes, in parallel, straight into the fused parameters.

Stored tensors are cut into pieces of whole tile rows; each piece is read at its offset, turned into the final dtype
in place, and forgotten, so that memory never holds more than the finished slice and about one tensor. Knows nothing
of the model's arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from workers.config import ModelConfig, ShardSpec
from workers.errors import CheckpointError, KernelError
from workers.kernels.cpu.library import build, multiplies_bf16, native
from workers.kernels.cpu.panels import PanelWeight, Products, Tiling
from workers.kernels.dequant import dequantize_into
from workers.kernels.linear import Weight, empty_weight
from workers.kernels.tiles import TILE, TileWeight
from workers.kernels.triton.choice import has_triton
from workers.layout import Span
from workers.safetensors_header import SCALE_SUFFIX, StoredTensor, check_checkpoint
from workers.weights import TensorSlice, param_shapes, rank_slices

Progress = Callable[[int, int], None]
"""Called with bytes read so far and in all, in the thread that called `read`."""

NUM_READERS = min(4, os.cpu_count() or 1)
MIN_PIECE_BYTES = 16 * 2**10
MAX_PIECE_BYTES = 4 * 2**20
PIECES_PER_TENSOR = 16 * NUM_READERS
"""Pieces in flight take about a sixteenth of the largest tensor: a reader's heap keeps several of them after use."""
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.uint8}
"""FP8 as its bits."""


def no_progress(_read_bytes: int, _total_bytes: int) -> None:
    """For callers that show none."""


@dataclass(frozen=True)
class Checkpoint:
    """A checked model directory: every tensor's place is known, no weight has been read."""

    directory: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Read config, index and headers. Raises CheckpointError naming the file and the remedy."""
        config = ModelConfig.from_dir(directory)
        return cls(Path(directory), config, check_checkpoint(directory, config))

    def slice_bytes(self, spec: ShardSpec) -> int:
        """Stored bytes of a rank's slice, scales included."""
        return sum(self._num_bytes(part) for part in rank_slices(self.config, spec))

    def read(
        self,
        spec: ShardSpec,
        progress: Progress = no_progress,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        products: Products = "fp32",
    ) -> dict[str, Weight]:
        """This rank's fused parameters. Where there are kernels for it, matrices keep their stored values: in panels
        on a CPU, for these products, on a GPU the FP8 ones that are cut at tiles.

        Raises LayoutError or KernelError before any byte is read, CheckpointError where a file fails.
        """
        spec.layout.check(self.config)
        slices = list(rank_slices(self.config, spec))
        shapes = param_shapes(slices)
        by_param = {name: [part for part in slices if part.param == name] for name in shapes}
        is_cpu = device is None or device.type == "cpu"
        has_panels = native() is not None and is_cpu and dtype == torch.float32
        if is_cpu and products == "bf16" and not multiplies_bf16():
            raise KernelError(
                f"products in bf16 need a CPU with avx512_bf16 and the kernels compiled for it; this rank has "
                f"{build() or 'none'}; take --products fp32"
            )
        params = {
            name: self._empty(shape, by_param[name], dtype, device, products if has_panels else None)
            for name, shape in shapes.items()
        }
        total = sum(self._num_bytes(part) for part in slices)
        piece_bytes = max(self._num_bytes(part) for part in slices) // PIECES_PER_TENSOR
        pieces = [piece for part in slices for piece in self._cut(part, piece_bytes)]
        with ExitStack() as stack:
            files = {file: stack.enter_context(OpenShard(file, is_pinned=not is_cpu)) for file in self._files(slices)}
            pool = stack.enter_context(ThreadPoolExecutor(NUM_READERS, "checkpoint"))
            stack.callback(pool.shutdown, cancel_futures=True)
            read = 0
            for done in as_completed([pool.submit(self._load, piece, params, files) for piece in pieces]):
                read += done.result()
                progress(read, total)
        return params

    def _files(self, slices: list[TensorSlice]) -> set[Path]:
        stored = [self.tensors[part.name].file for part in slices]
        scales = [self.tensors[part.name + SCALE_SUFFIX].file for part in slices if self._is_fp8(part)]
        return {*stored, *scales}

    def _is_fp8(self, part: TensorSlice) -> bool:
        return self.tensors[part.name].dtype == "F8_E4M3"

    def _num_bytes(self, part: TensorSlice) -> int:
        stored = part.num_elements * self.tensors[part.name].item_bytes
        if not self._is_fp8(part):
            return stored
        rows, cols = self._tiles(part)
        return stored + rows.size * cols.size * self.tensors[part.name + SCALE_SUFFIX].item_bytes

    def _block(self) -> tuple[int, int]:
        assert self.config.quantization is not None, "only FP8 tensors ask, and they need a quantization_config"
        return self.config.quantization.block_rows, self.config.quantization.block_cols

    def _tiles(self, part: TensorSlice) -> tuple[Span, Span]:
        """The tiles that a slice touches."""
        assert part.cols is not None, "FP8 tensors are matrices"
        rows, cols = self._block()
        touched_rows = Span(part.rows.start // rows, -(-part.rows.stop // rows))
        return touched_rows, Span(part.cols.start // cols, -(-part.cols.stop // cols))

    def _cut(self, part: TensorSlice, piece_bytes: int) -> Iterator[TensorSlice]:
        """Pieces of whole tile rows, so that no scale is read twice."""
        height = self._block()[0] if self._is_fp8(part) else 1
        row_bytes = part.num_elements // part.rows.size * self.tensors[part.name].item_bytes
        wanted = min(max(piece_bytes, MIN_PIECE_BYTES), MAX_PIECE_BYTES) // row_bytes
        step = max(wanted // height, 1) * height
        start = part.rows.start
        while start < part.rows.stop:
            stop = min((start // step + 1) * step, part.rows.stop)
            row = part.param_row + start - part.rows.start
            yield replace(part, rows=Span(start, stop), param_row=row)
            start = stop

    def _load(self, piece: TensorSlice, params: dict[str, Weight], files: dict[Path, OpenShard]) -> int:
        """Read one piece into its parameter; returns the bytes read."""
        param, stored = params[piece.param], self.tensors[piece.name]
        raw = files[stored.file].read(piece.name, stored, piece.rows, piece.cols)
        values = raw.view(TORCH_DTYPES[stored.dtype]).view(piece.rows.size, -1)
        if not self._is_fp8(piece):
            _store(param, piece, values)
            return raw.numel()
        rows, cols = self._tiles(piece)
        scale = self.tensors[piece.name + SCALE_SUFFIX]
        raw_scale = files[scale.file].read(piece.name + SCALE_SUFFIX, scale, rows, cols)
        scale_rc = raw_scale.view(TORCH_DTYPES[scale.dtype]).view(rows.size, cols.size)
        self._store_fp8(param, piece, values, scale_rc)
        return raw.numel() + raw_scale.numel()

    def _store_fp8(self, param: Weight, piece: TensorSlice, codes: Tensor, scale_rc: Tensor) -> None:
        assert piece.cols is not None, "FP8 tensors are matrices"
        block = self._block()
        origin = (piece.rows.start % block[0], piece.cols.start % block[1])
        if isinstance(param, TileWeight):
            param.store_rows(piece.expert, piece.param_row, codes, scale_rc)
            return
        if isinstance(param, PanelWeight) and param.scale_etX is not None:
            tile_of_row = (torch.arange(piece.rows.size) + origin[0]) // block[0]
            param.store_rows(piece.expert or 0, piece.param_row, codes)
            param.store_scales(piece.expert or 0, piece.param_row, scale_rc[tile_of_row])
            return
        is_panel = isinstance(param, PanelWeight)
        out = torch.empty(codes.shape) if is_panel else _rows_of(param, piece)
        dequantize_into(out, codes.to(out.device), scale_rc.to(out.device), block=block, origin=origin)
        if is_panel:
            _store(param, piece, out)

    def _empty(
        self,
        shape: tuple[int, ...],
        parts: list[TensorSlice],
        dtype: torch.dtype,
        device: torch.device | None,
        products: Products | None,
    ) -> Weight:
        """Room for one parameter, in panels for these products where there are any. Vectors have no layout; of an
        embedding that is no head, rows are looked up."""
        stored = {self.tensors[part.name].dtype for part in parts}
        is_table = parts[0].param == "embed" and not self.config.tie_word_embeddings
        if len(shape) == 1 or is_table:
            return torch.empty(shape, dtype=torch.bfloat16 if is_table and stored == {"BF16"} else dtype, device=device)
        if products is None and self._has_tiles(parts, torch.device("cpu") if device is None else device):
            return TileWeight.empty(shape, device)
        if products is None:
            return empty_weight(shape, dtype, device)
        tiling, panel_dtype = None, torch.bfloat16 if stored == {"BF16"} else torch.float32
        if stored == {"F8_E4M3"}:
            first_col, block_cols = _first_col(parts[0]), self._block()[1]
            tiling, panel_dtype = Tiling(first=block_cols - first_col % block_cols, size=block_cols), torch.uint8
        param = parts[0].param
        if param.endswith(".gate"):  # small, and what it chooses should not hang on a rounding
            products = "fp32"
        return PanelWeight.empty(shape, panel_dtype, tiling, is_paired=param.endswith("gate_up"), products=products)

    def _has_tiles(self, parts: list[TensorSlice], device: torch.device) -> bool:
        """Whether GPU kernels can read a parameter as it is stored."""
        if not has_triton(device.type) or not all(self._is_fp8(part) for part in parts):
            return False
        cuts = [cut for part in parts for cut in (part.param_row, part.rows.start, *(part.cols or ()))]
        return self._block() == (TILE, TILE) and all(cut % TILE == 0 for cut in cuts)


def _first_col(part: TensorSlice) -> int:
    assert part.cols is not None, "FP8 tensors are matrices"
    return part.cols.start


def _store(param: Weight, piece: TensorSlice, values_RC: Tensor) -> None:
    """Put a piece's rows into place, in the parameter's own dtype."""
    if isinstance(param, PanelWeight):
        param.store_rows(piece.expert or 0, piece.param_row, values_RC.to(param.panels_ePIL.dtype))
    else:
        out = _rows_of(param, piece)
        out.copy_(values_RC.view(out.shape), non_blocking=True)


def _rows_of(param: Weight, piece: TensorSlice) -> Tensor:
    assert isinstance(param, Tensor), "panels and tiles have no rows to write to"
    target = param if piece.expert is None else param[piece.expert]
    return target[piece.param_row : piece.param_row + piece.rows.size]


class OpenShard:
    """An open safetensors file; reads at offsets, from many threads at once.

    Pinned: into memory from which a GPU copies by itself, while the next piece is read. Else its driver would copy
    every piece once more, and readers would wait for one another. torch gives such memory to the next piece when its
    copy has been made, not before.
    """

    def __init__(self, file: Path, *, is_pinned: bool = False) -> None:
        self.file, self._is_pinned = file, is_pinned

    def __enter__(self) -> OpenShard:
        try:
            self._fd = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be opened ({error.strerror}); check the file") from error
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._fd)

    def read(self, name: str, stored: StoredTensor, rows: Span, cols: Span | None) -> Tensor:
        """The bytes of a slice, rows one after another, as uint8. Raises CheckpointError where the file ends early."""
        width = 1 if cols is None else stored.shape[1]
        first, count = (0, 1) if cols is None else (cols.start, cols.size)
        raw = torch.empty(rows.size * count * stored.item_bytes, dtype=torch.uint8, pin_memory=self._is_pinned)
        view = memoryview(raw.numpy().data)
        start = stored.offset + (rows.start * width + first) * stored.item_bytes
        if count == width:
            self._fill(name, view, start)
            return raw
        row_bytes = count * stored.item_bytes
        for row in range(rows.size):
            piece = view[row * row_bytes : (row + 1) * row_bytes]
            self._fill(name, piece, start + row * width * stored.item_bytes)
        return raw

    def _fill(self, name: str, view: memoryview, offset: int) -> None:
        while len(view):
            try:
                count = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise CheckpointError(
                    f"{self.file}: reading {name} failed ({error.strerror}); check the disk"
                ) from error
            if count == 0:
                raise CheckpointError(f"{self.file}: ends inside {name} at byte {offset}; download it again")
            view, offset = view[count:], offset + count
