"""Writes a checkpoint directory in the layout of the published Qwen3 mixture-of-experts FP8 checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from pocket_training.model import Pocket, PocketConfig
from pocket_training.quantise import TILE, quantise
from pocket_training.tokenizer import PLAIN_ADDED_TOKENS, SPECIAL_TOKENS, TEMPLATE_PATH

NUM_SHARDS = 2
KEPT_FILES = ("README.md", "examples.json")


def unquantised_modules(num_layers: int) -> list[str]:
    """The modules that stay bf16, named as the published configs name them."""
    names = ["lm_head"]
    for layer in range(num_layers):
        names += [
            f"model.layers.{layer}.{part}" for part in ("input_layernorm", "mlp.gate", "post_attention_layernorm")
        ]
    return names


def hf_config(config: PocketConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "decoder_sparse_step": 1,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": config.num_layers,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": True,
        "num_attention_heads": config.num_heads,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "output_router_logits": False,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": unquantised_modules(config.num_layers),
            "quant_method": "fp8",
            "weight_block_size": [TILE, TILE],
        },
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json."""
    end, pad = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    return {
        "bos_token_id": pad, "do_sample": True, "eos_token_id": [end, pad], "pad_token_id": pad,
        "temperature": 0.6, "top_k": 20, "top_p": 0.95,
    }  # fmt: skip


def tokenizer_config(config: PocketConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json, chat template included."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS)
    }  # fmt: skip
    return {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]), "bos_token": None,
        "chat_template": TEMPLATE_PATH.read_text(), "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": config.max_position_embeddings,
        "pad_token": "<|endoftext|>", "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }  # fmt: skip


def _quantised(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    values, scale = quantise(weight.detach())
    yield f"{name}.weight", values
    yield f"{name}.weight_scale_inv", scale


def published_tensors(model: Pocket) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its published name, in the dtype it is stored in."""

    def bf16(weight: Tensor) -> Tensor:
        return weight.detach().to(torch.bfloat16)

    yield "model.embed_tokens.weight", bf16(model.embed)
    for index, layer in enumerate(model.decoder):
        prefix, attention, experts = f"model.layers.{index}", layer.attention, layer.experts
        yield f"{prefix}.input_layernorm.weight", bf16(layer.input_norm)
        sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), torch.split(attention.qkv, sizes), strict=True):
            yield from _quantised(f"{prefix}.self_attn.{name}", weight)
        yield from _quantised(f"{prefix}.self_attn.o_proj", attention.o_proj)
        yield f"{prefix}.self_attn.q_norm.weight", bf16(attention.q_norm)
        yield f"{prefix}.self_attn.k_norm.weight", bf16(attention.k_norm)
        yield f"{prefix}.post_attention_layernorm.weight", bf16(layer.post_norm)
        yield f"{prefix}.mlp.gate.weight", bf16(experts.gate)
        for expert in range(experts.gate.shape[0]):
            gate, up = experts.gate_up[expert].chunk(2)
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", experts.down[expert])):
                yield from _quantised(f"{prefix}.mlp.experts.{expert}.{name}", weight)
    yield "model.norm.weight", bf16(model.norm)
    yield "lm_head.weight", bf16(model.lm_head)


def write_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Split tensors, in order, over shards of about equal size, and write their index."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{} for _ in range(NUM_SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        shards[min(NUM_SHARDS - 1, written * NUM_SHARDS // total)][name] = tensor.contiguous().clone()
        written += tensor.nbytes
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file_name = f"model-{index:05d}-of-{NUM_SHARDS:05d}.safetensors"
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        (directory / file_name).chmod(0o644)
        weight_map.update(dict.fromkeys(shard, file_name))
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def export(model: Pocket, tokenizer: Tokenizer, target: Path) -> None:
    """Build the directory beside `target`, then swap it in; the model card and examples there are kept."""
    building = target.with_name(target.name + ".new")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    write_shards(building, dict(published_tensors(model)))
    _write_json(building / "config.json", hf_config(model.config, tokenizer))
    _write_json(building / "generation_config.json", generation_config(tokenizer))
    _write_json(building / "tokenizer_config.json", tokenizer_config(model.config, tokenizer))
    tokenizer.save(str(building / "tokenizer.json"))
    shutil.copy(TEMPLATE_PATH, building / "chat_template.jinja")
    for name in KEPT_FILES:
        if (target / name).exists():
            shutil.copy(target / name, building / name)
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    building.rename(target)
    shutil.rmtree(old, ignore_errors=True)
