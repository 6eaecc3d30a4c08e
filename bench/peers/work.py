"""What a token must at least read and compute, by the checkpoint's own sizes: the floor under every engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workers.config import ModelConfig
from workers.weights import whole_model

TILE = 128


@dataclass(frozen=True)
class Work:
    """Of one token at one stream."""

    num_parameters: int
    weight_bytes: int
    """All stored bytes: what a process keeps resident."""
    read_bytes: int
    """FP8 codes and scales of the layers, the chosen experts alone, and the head; no row of the embedding."""
    multiplied: int
    """Parameters that it is multiplied with, the head left out: a prompt needs that of its last token only."""
    kv_bytes_per_token: int
    """In fp32, as the CPU path keeps it."""

    @classmethod
    def of(cls, directory: Path) -> Work:
        config = ModelConfig.from_dir(directory)
        share = config.num_experts_per_token / config.num_experts if config.num_experts else 1.0
        num_parameters = weight_bytes = read_bytes = multiplied = 0.0
        for part in whole_model(config):
            size = _num_elements(part.shape)
            stored = size + 2 * _num_tiles(part.shape) if part.is_linear else 2 * size
            active = share if ".experts." in part.name else 1.0
            num_parameters += size
            weight_bytes += stored
            if _is_read(part.name, config):
                read_bytes += active * stored
            if len(part.shape) == 2 and "layers." in part.name:
                multiplied += active * size
        kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
        return cls(round(num_parameters), round(weight_bytes), round(read_bytes), round(multiplied), kv_bytes)


def _is_read(name: str, config: ModelConfig) -> bool:
    """Whether every token reads all of it: an embedding that is not the head, too, is read a row at a time."""
    return "embed_tokens" not in name or config.tie_word_embeddings


def _num_elements(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def _num_tiles(shape: tuple[int, ...]) -> int:
    return -(-shape[0] // TILE) * -(-shape[1] // TILE)
