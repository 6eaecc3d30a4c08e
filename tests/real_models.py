"""The shapes of the models that are served, as their config.json has them."""

from __future__ import annotations

from dataclasses import replace

from workers.config import ModelConfig, Quantization

FP8 = Quantization(block_rows=128, block_cols=128)
QWEN3_4B = ModelConfig(
    architecture="qwen3",
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=5e6,
    max_position_embeddings=262144,
    tie_word_embeddings=True,
    eos_token_ids=(151645,),
    quantization=FP8,
)
QWEN3_235B = replace(
    QWEN3_4B,
    architecture="qwen3_moe",
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=94,
    num_heads=64,
    num_kv_heads=4,
    tie_word_embeddings=False,
    num_experts=128,
    num_experts_per_token=8,
    moe_intermediate_size=1536,
    norm_topk_prob=True,
)
