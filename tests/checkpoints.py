"""Tiny random checkpoints in the published formats, and transformers' model of the same dequantised weights.

Names, shapes and quantisation are written out here once more, on purpose: an oracle that shared the product's lists
would share their errors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TILE = 128

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 301,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000.0,
    "eos_token_id": 300,
    "torch_dtype": "bfloat16",
}
"""384 columns are three tiles, which two ranks share unevenly; 301 rows are an odd vocabulary."""

MOE: dict[str, Any] = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
}
"""Five experts split unevenly over two ranks; layer 1 is dense."""

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [TILE, TILE]}


def write_checkpoint(directory: Path, base: dict[str, Any], *, fp8: bool, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint of random weights in two shards with an index."""
    config = base | changes | ({"quantization_config": FP8} if fp8 else {})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, weight in random_weights(config, seed).items():
        if fp8 and name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize(weight)
        else:
            tensors[name] = weight.to(torch.bfloat16)
    write_shards(directory, tensors, num_shards=2)
    return directory


def random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Weights large enough that logits differ clearly."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def norm(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    weights = {"model.embed_tokens.weight": 2 * normal(config["vocab_size"], hidden), "model.norm.weight": norm(hidden)}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = 4 * normal(config["vocab_size"], hidden)

    def feed_forward(prefix: str, size: int) -> None:
        weights[f"{prefix}.gate_proj.weight"] = normal(size, hidden)
        weights[f"{prefix}.up_proj.weight"] = normal(size, hidden)
        weights[f"{prefix}.down_proj.weight"] = normal(hidden, size)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, rows, cols in (
            ("q", q_size, hidden),
            ("k", kv_size, hidden),
            ("v", kv_size, hidden),
            ("o", hidden, q_size),
        ):
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = normal(rows, cols)
        for name, size in (("self_attn.q_norm", head_dim), ("self_attn.k_norm", head_dim)):
            weights[f"{prefix}.{name}.weight"] = norm(size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{name}.weight"] = norm(hidden)
        step = config.get("decoder_sparse_step", 1)
        if "num_experts" in config and layer not in config["mlp_only_layers"] and (layer + 1) % step == 0:
            weights[f"{prefix}.mlp.gate.weight"] = 3 * normal(config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                feed_forward(f"{prefix}.mlp.experts.{expert}", config["moe_intermediate_size"])
        else:
            feed_forward(f"{prefix}.mlp", config["intermediate_size"])
    return weights


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and one bf16 scale per tile; `value * scale` is the weight."""
    rows, cols = (-(-size // TILE) for size in weight.shape)
    scales = torch.empty(rows, cols, dtype=torch.bfloat16)
    values = torch.empty_like(weight)
    for row in range(rows):
        for col in range(cols):
            tile = (slice(row * TILE, (row + 1) * TILE), slice(col * TILE, (col + 1) * TILE))
            scales[row, col] = weight[tile].abs().max() / 448
            values[tile] = weight[tile] / scales[row, col].float()
    return values.clamp(-448, 448).to(torch.float8_e4m3fn), scales


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """The weight that a quantised tensor stands for, in fp32."""
    expanded = scales.float().repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    return values.float() * expanded[: values.shape[0], : values.shape[1]]


def write_shards(directory: Path, tensors: dict[str, Tensor], num_shards: int) -> None:
    """safetensors files of about as many tensors each, and their index."""
    names = list(tensors)
    weight_map = {}
    for index in range(num_shards):
        file = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[index::num_shards]
        save_file({name: tensors[name].contiguous() for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every stored tensor, by the safetensors library."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - safe_open is no dict
    return tensors


def reference_model(directory: Path, scratch: Path) -> Any:
    """transformers' model of the dequantised weights, in fp32."""
    from transformers import AutoModelForCausalLM

    stored = read_tensors(directory)
    plain = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(f"{name}_scale_inv")
        plain[name] = tensor.float() if scale is None else dequantize(tensor, scale)
    scratch.mkdir(parents=True, exist_ok=True)
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config", None)
    (scratch / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    save_file(plain, scratch / "model.safetensors", metadata={"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32, attn_implementation="eager").eval()
