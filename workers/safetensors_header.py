"""Finds every tensor of a model directory from its index and safetensors headers, and checks them against the config.

Reads a few kilobytes, never a weight, and needs no torch: the command line uses it to refuse a bad directory at
once, the ranks to know where their bytes lie. Nothing that the files say is trusted: names stay inside the
directory, sizes are checked.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from workers.config import ModelConfig
from workers.errors import CheckpointError
from workers.weights import TensorSlice, whole_model

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
MAX_HEADER_BYTES = 100 * 2**20
ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4}
FLOAT_DTYPES = ("BF16", "F16", "F32")
AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor's bytes lie."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of the first byte, from the start of the file."""

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]


def check_checkpoint(directory: str | Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """Locate every tensor of the model. Raises CheckpointError naming the first wrong file and the remedy."""
    directory = Path(directory)
    found: dict[str, StoredTensor] = {}
    listed = _listed_tensors(directory)
    for file in sorted(set(listed.values())):
        header = read_header(directory / file)
        found.update({name: tensor for name, tensor in header.items() if listed.get(name) == file})
    for part in whole_model(config):
        _check_tensor(part, found, listed, config, directory)
    return found


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file. Raises CheckpointError where it is missing, cut short or corrupt."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if length < 2 or length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{file}: not a safetensors file (its header claims {length} bytes); {AGAIN}")
            header = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: shard is missing; download it into the directory") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); fix its permissions or {AGAIN}") from error
    if len(header) < length:
        raise CheckpointError(f"{file}: truncated inside its header ({size} bytes); {AGAIN}")
    return _parse_header(file, header, data_start=8 + length, file_size=size)


def _parse_header(file: Path, header: bytes, data_start: int, file_size: int) -> dict[str, StoredTensor]:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: corrupt safetensors header (not JSON); {AGAIN}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: corrupt safetensors header (not an object); {AGAIN}")
    entries.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in entries.items():
        tensor, end = _parse_entry(file, name, entry, data_start)
        if end > file_size:
            raise CheckpointError(f"{file}: truncated: {name} ends at byte {end}, the file has {file_size}; {AGAIN}")
        if tensor.dtype in ITEM_BYTES:
            tensors[name] = tensor
        if end > tensor.offset:
            spans.append((tensor.offset, end, name))
    _check_disjoint(file, spans)
    return tensors


def _check_disjoint(file: Path, spans: list[tuple[int, int, str]]) -> None:
    spans.sort()
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise CheckpointError(f"{file}: corrupt safetensors header ({name!r} and {other!r} overlap); {AGAIN}")


def _parse_entry(file: Path, name: str, entry: Any, data_start: int) -> tuple[StoredTensor, int]:
    """The tensor and the byte after its last one."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(f"{file}: corrupt safetensors header (entry {name!r}); {AGAIN}")
    if dtype in ITEM_BYTES and end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(f"{file}: {name} of {dtype} {list(shape)} cannot fill {end - begin} bytes; {AGAIN}")
    return StoredTensor(file, dtype, shape, data_start + begin), data_start + end


def _listed_tensors(directory: Path) -> dict[str, str]:
    """Tensor name → file name, from the index or from the single file. File names cannot leave the directory."""
    index = directory / INDEX_NAME
    if not index.is_file():
        single = directory / SINGLE_NAME
        if not single.is_file():
            raise CheckpointError(f"{directory}: neither {INDEX_NAME} nor {SINGLE_NAME}; download the weights into it")
        return dict.fromkeys(read_header(single), SINGLE_NAME)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: no readable weight_map; {AGAIN}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map is not a mapping of names to files; {AGAIN}")
    _check_file_names(index, set(weight_map.values()))
    return weight_map


def _check_file_names(index: Path, names: Iterable[str]) -> None:
    for name in names:
        plain = name not in ("", ".", "..") and not any(mark in name for mark in ("/", "\\", "\0"))
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: {name!r} is not the name of a safetensors file beside it; do not trust this checkpoint"
            )


def _check_tensor(
    part: TensorSlice, found: dict[str, StoredTensor], listed: dict[str, str], config: ModelConfig, directory: Path
) -> None:
    """One tensor of the model is there with the right shape and dtype, and with its scales if it is FP8."""
    tensor = _require(part.name, found, listed, directory)
    if tensor.shape != part.shape:
        shapes = f"{list(tensor.shape)}, config.json implies {list(part.shape)}"
        raise CheckpointError(f"{tensor.file}: {part.name} has shape {shapes}; config and weights must be of one model")
    if tensor.dtype in FLOAT_DTYPES:
        return
    if not part.is_linear or config.quantization is None:
        remedy = (
            "expected BF16, F16 or F32" if not part.is_linear else "config.json lacks quantization_config; restore it"
        )
        raise CheckpointError(f"{tensor.file}: {part.name} is {tensor.dtype}; {remedy}")
    rows, cols = config.quantization.block_rows, config.quantization.block_cols
    scale = _require(part.name + SCALE_SUFFIX, found, listed, directory)
    expected = (-(-part.shape[0] // rows), -(-part.shape[1] // cols))
    if scale.shape != expected or scale.dtype not in FLOAT_DTYPES:
        got = f"{scale.dtype} {list(scale.shape)}"
        raise CheckpointError(
            f"{scale.file}: {part.name}{SCALE_SUFFIX} is {got}, expected floats {list(expected)}; {AGAIN}"
        )


def _require(name: str, found: dict[str, StoredTensor], listed: dict[str, str], directory: Path) -> StoredTensor:
    if name in found:
        return found[name]
    what = "scales are" if name.endswith(SCALE_SUFFIX) else "tensor is"
    if name in listed:
        raise CheckpointError(
            f"{directory / listed[name]}: {name}: its {what} not in the file that should hold it; {AGAIN}"
        )
    source = directory / (INDEX_NAME if (directory / INDEX_NAME).is_file() else SINGLE_NAME)
    raise CheckpointError(
        f"{source}: {name}: the {what} missing; {AGAIN}, or check that config.json belongs to these weights"
    )
