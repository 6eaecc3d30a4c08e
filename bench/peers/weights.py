"""The published FP8 checkpoint as plain fp32 tensors, one at a time: what engines without FP8 are given.

    python -m bench.peers.weights FP8_DIR OUT_DIR        the same checkpoint in fp32, for transformers and vLLM

e4m3 codes times their tile's scale are exact in fp32 (bf16 would round them), so that all engines have the same
weights. Needs numpy alone: the GGUF is written in llama.cpp's environment.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

TILE = 128
SCALE_SUFFIX = "_scale_inv"
SHARD_BYTES = 2**30
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def e4m3_values() -> Floats:
    """The value of each of the 256 codes."""
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3) & 15, codes & 7
    normal = (1 + mantissas / 8) * 2.0 ** (exponents - 7)
    values = np.where(exponents == 0, mantissas / 8 * 2.0**-6, normal)
    values[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


def dequantised(codes_NK: NDArray[np.uint8], scales_nk: Floats) -> Floats:
    """Codes times the scales of their tiles; tiles at the edges may be cut."""
    values_NK = e4m3_values()[codes_NK]
    for row, scales_k in enumerate(scales_nk):
        columns_K = np.repeat(scales_k, TILE)[: values_NK.shape[1]]
        values_NK[row * TILE : (row + 1) * TILE] *= columns_K
    return values_NK


class Fp8Checkpoint:
    """Reads one tensor at a time, as fp32."""

    def __init__(self, directory: Path) -> None:
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self._places = {}
        for file in sorted(directory.glob("*.safetensors")):
            for name, entry in _header(file).items():
                self._places[name] = (file, entry)

    @property
    def names(self) -> list[str]:
        """All tensors but the scales, which are part of theirs."""
        return [name for name in self._places if not name.endswith(SCALE_SUFFIX)]

    def read(self, name: str) -> Floats:
        values = self._read(name)
        if values.dtype != np.uint8:
            return values.astype(np.float32)
        return dequantised(values, self._read(name + SCALE_SUFFIX).astype(np.float32))

    def _read(self, name: str) -> NDArray[Any]:
        """fp32, or the codes of an FP8 tensor."""
        file, entry = self._places[name]
        kinds = {"BF16": np.uint16, "F32": np.float32, "F8_E4M3": np.uint8}
        raw = np.memmap(file, kinds[entry["dtype"]], "r", entry["offset"], tuple(entry["shape"]))
        if entry["dtype"] == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return np.array(raw)


def _header(file: Path) -> dict[str, dict[str, Any]]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        entries: dict[str, dict[str, Any]] = json.loads(stream.read(size))
    entries.pop("__metadata__", None)
    for entry in entries.values():
        entry["offset"] = 8 + size + entry["data_offsets"][0]
    return entries


def fp32_config(config: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's config.json without its quantization."""
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    return plain | {"torch_dtype": "float32"}


def write_fp32(fp8_dir: Path, out_dir: Path) -> None:
    """The same checkpoint with every tensor in fp32."""
    from safetensors.numpy import save_file

    checkpoint = Fp8Checkpoint(fp8_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(_shards(checkpoint)):
        file = f"model-{index:05d}.safetensors"
        save_file(shard, out_dir / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (out_dir / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in COPIED:
        if (fp8_dir / name).is_file():
            shutil.copyfile(fp8_dir / name, out_dir / name)
    # Last: it says that the rest is there.
    (out_dir / "config.json").write_text(json.dumps(fp32_config(checkpoint.config), indent=2))


def _shards(checkpoint: Fp8Checkpoint) -> Iterator[dict[str, Floats]]:
    shard: dict[str, Floats] = {}
    for name in checkpoint.names:
        if sum(values.nbytes for values in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = checkpoint.read(name)
    yield shard


if __name__ == "__main__":
    write_fp32(Path(sys.argv[1]), Path(sys.argv[2]))
