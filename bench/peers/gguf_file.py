"""The checkpoint as GGUF, for llama.cpp: the same weights as F32 or Q8_0, without a vocabulary.

    python -m bench.peers.gguf_file FP8_DIR OUT.gguf F32|Q8_0        in llama.cpp's environment

Rotary pairs are halves of a head both here and in llama.cpp for these models: no rows change places. Experts of a
layer become one tensor. Norms and gates stay fp32, as in llama.cpp's own converter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.weights import Floats, Fp8Checkpoint

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
EXPERT_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor that is not an expert's."""
    if name in NAMES:
        return NAMES[name]
    layer, part = _in_layer(name)
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def _in_layer(name: str) -> tuple[int, str]:
    """Layer and the rest of `model.layers.3.mlp.gate.weight`, without its ends."""
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return int(layer), part


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def metadata(config: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters by llama.cpp's names, without the architecture before them."""
    fields = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    if architecture(config) == "qwen3moe":
        fields |= {
            "expert_count": config["num_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
        }
    return fields


def architecture(config: dict[str, Any]) -> str:
    return {"qwen3": "qwen3", "qwen3_moe": "qwen3moe"}[config["model_type"]]


def tensors(checkpoint: Fp8Checkpoint) -> Iterator[tuple[str, Floats]]:
    """All tensors by their GGUF names; the experts of a layer as one."""
    for name in checkpoint.names:
        if not is_expert(name):
            yield gguf_name(name), checkpoint.read(name)
    for layer in range(checkpoint.config["num_hidden_layers"] if any(map(is_expert, checkpoint.names)) else 0):
        for projection, theirs in EXPERT_NAMES.items():
            experts = [
                checkpoint.read(f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight")
                for expert in range(checkpoint.config["num_experts"])
            ]
            yield f"blk.{layer}.{theirs}.weight", np.stack(experts)


def write_gguf(fp8_dir: Path, out: Path, kind: str) -> None:
    """Write the file; `kind` is F32 or Q8_0."""
    import gguf

    checkpoint = Fp8Checkpoint(fp8_dir)
    arch = architecture(checkpoint.config)
    writer = gguf.GGUFWriter(out, arch, use_temp_file=True)
    for field, value in metadata(checkpoint.config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{arch}.{field}", value)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "Q8_0" else gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    for name, values in tensors(checkpoint):
        if kind == "Q8_0" and values.ndim > 1 and "ffn_gate_inp" not in name:
            quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
