"""Random FP8 checkpoints in the published formats, with the dimensions of real models and as many layers as asked for.

    python -m bench.make_checkpoint DIR --model 235b --layers 1 [--vocab 1024]

Names, scales per tile, shards and index are those of the published files. Weights are normal, as large as a layer's
initialisation makes them, so that activations keep their size from layer to layer.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from workers.config import ModelConfig
from workers.safetensors_header import INDEX_NAME, SCALE_SUFFIX
from workers.weights import TensorSlice, whole_model

TILE = 128
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE]}
COMMON = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "quantization_config": QUANTIZATION,
}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "0.1b": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 65536,
    },
    "0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "0.5b-moe": {
        **MOE,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 384,
    },
    # 1.4 B parameters, 0.3 B of them active.
    "1.5b-moe": {
        **MOE,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
    },
    "30b-a3b": {
        **MOE,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "235b": {
        **MOE,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536,
    },
}
SHARD_BYTES = 2**30
STD_IN_FP8 = 112.0
"""The largest of a tile's 16,384 normal values is about four deviations, which the scale brings to 448."""
POOL_ELEMENTS = 48 * 2**20
"""More than the largest matrix has."""


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; its values are drawn only then."""

    name: str
    part: TensorSlice
    is_scale: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(-(-size // TILE) for size in self.part.shape) if self.is_scale else self.part.shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * (1 if self.part.is_linear and not self.is_scale else 2)


class RandomWeights:
    """Draws tensors. FP8 values come from a pool, at random places: drawing billions of them would take minutes."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        pool = torch.randn(POOL_ELEMENTS, generator=self.generator).mul_(STD_IN_FP8).clamp_(-448, 448)
        self.pool = pool.to(torch.float8_e4m3fn).view(torch.uint8)

    def draw(self, tensor: NewTensor) -> Tensor:
        if tensor.is_scale:
            # As the tiles' largest values differ from one another.
            spread = 0.85 + 0.3 * torch.rand(tensor.shape, generator=self.generator)
            return (spread / (STD_IN_FP8 * tensor.part.shape[1] ** 0.5)).to(torch.bfloat16)
        if tensor.part.is_linear:
            return self._fp8(tensor.shape)
        normal = torch.randn(tensor.shape, generator=self.generator)
        if len(tensor.shape) == 1:
            return (1 + 0.1 * normal).to(torch.bfloat16)
        # Gates and heads that tell tokens apart; the embedding is a row per token.
        size = 1.0 if "embed" in tensor.name else 3 / tensor.shape[1] ** 0.5
        return (size * normal).to(torch.bfloat16)

    def _fp8(self, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        start = int(torch.randint(0, POOL_ELEMENTS - count + 1, (1,), generator=self.generator))
        return self.pool[start : start + count].clone().view(shape).view(torch.float8_e4m3fn)


def write_checkpoint(
    directory: Path, shape: str, *, layers: int | None = None, vocab: int | None = None, seed: int = 0
) -> Path:
    """Write config.json, shards and index of a random model; `layers` and `vocab` None are the real model's."""
    config = COMMON | SHAPES[shape]
    changes = {"num_hidden_layers": layers, "vocab_size": vocab}
    config |= {name: value for name, value in changes.items() if value is not None}
    config["eos_token_id"] = min(151645, config["vocab_size"] - 1)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    shards = list(_shards(ModelConfig.from_dir(directory)))
    weights, weight_map = RandomWeights(seed), {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file({tensor.name: weights.draw(tensor) for tensor in shard}, directory / file, metadata={"format": "pt"})
        weight_map |= {tensor.name: file for tensor in shard}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return directory


def _shards(config: ModelConfig) -> Iterator[list[NewTensor]]:
    shard: list[NewTensor] = []
    for tensor in _tensors(config):
        if shard and sum(held.num_bytes for held in shard) + tensor.num_bytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _tensors(config: ModelConfig) -> Iterator[NewTensor]:
    for part in whole_model(config):
        yield NewTensor(part.name, part)
        if part.is_linear:
            yield NewTensor(part.name + SCALE_SUFFIX, part, is_scale=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--vocab", type=int, help="instead of the model's own size")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_checkpoint(args.directory, args.model, layers=args.layers, vocab=args.vocab, seed=args.seed)
    size = sum(file.stat().st_size for file in args.directory.iterdir())
    print(f"{args.directory}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
