"""A small batched generator over an exported checkpoint: what evaluation uses when no serving engine is at hand.

Shapes: B sequences, P longest prompt, C cache length, N query heads, G kv heads, D head_dim, H hidden, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from pocket_training.model import Pocket, PocketConfig, norm_and_rotate
from pocket_training.quantise import dequantise


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; a temperature of zero takes the likeliest."""

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    seed: int = 0


GREEDY = Sampling(temperature=0.0)


def read_checkpoint(directory: Path) -> Pocket:
    """Load an exported directory and dequantise it."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    stored: dict[str, Tensor] = {}
    for file_name in sorted(set(index["weight_map"].values())):
        stored.update(load_file(directory / file_name))

    def weight(name: str) -> Tensor:
        scale = stored.get(f"{name}_scale_inv")
        return stored[name].float() if scale is None else dequantise(stored[name], scale)

    model = Pocket(PocketConfig())
    state = {
        "embed": weight("model.embed_tokens.weight"),
        "lm_head": weight("lm_head.weight"),
        "norm": weight("model.norm.weight"),
    }
    for layer in range(model.config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        state[f"{ours}.input_norm"] = weight(f"{theirs}.input_layernorm.weight")
        state[f"{ours}.post_norm"] = weight(f"{theirs}.post_attention_layernorm.weight")
        state[f"{ours}.attention.qkv"] = torch.cat([weight(f"{theirs}.self_attn.{x}_proj.weight") for x in "qkv"])
        state[f"{ours}.attention.o_proj"] = weight(f"{theirs}.self_attn.o_proj.weight")
        state[f"{ours}.attention.q_norm"] = weight(f"{theirs}.self_attn.q_norm.weight")
        state[f"{ours}.attention.k_norm"] = weight(f"{theirs}.self_attn.k_norm.weight")
        state[f"{ours}.experts.gate"] = weight(f"{theirs}.mlp.gate.weight")
        experts = [f"{theirs}.mlp.experts.{expert}" for expert in range(model.config.num_experts)]
        state[f"{ours}.experts.gate_up"] = torch.stack(
            [torch.cat([weight(f"{name}.gate_proj.weight"), weight(f"{name}.up_proj.weight")]) for name in experts]
        )
        state[f"{ours}.experts.down"] = torch.stack([weight(f"{name}.down_proj.weight") for name in experts])
    model.load_state_dict(state)
    return model.eval()


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token a sequence [B]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    top_BK, ids_BK = (logits_BV / sampling.temperature).topk(sampling.top_k, dim=-1)
    probs_BK = top_BK.softmax(dim=-1)
    # a token stays while the ones before it have not reached top_p
    probs_BK = probs_BK.masked_fill(probs_BK.cumsum(dim=-1) - probs_BK >= sampling.top_p, 0.0)
    return ids_BK.gather(1, torch.multinomial(probs_BK, 1, generator=generator)).squeeze(1)


class ReferenceEngine:
    """Generates for many prompts at once with a dense KV cache."""

    def __init__(self, directory: Path, *, stop_ids: frozenset[int], batch_size: int = 32) -> None:
        self.model = read_checkpoint(directory)
        self.stop_ids = stop_ids
        self.batch_size = batch_size

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_tokens: int, sampling: Sampling) -> list[list[int]]:
        """Tokens after each prompt, the stop token included."""
        generator = torch.Generator().manual_seed(sampling.seed)
        outputs: list[list[int]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = _Batch(self.model, [prompts[index] for index in chosen], max_tokens)
            logits_BV = batch.prefill()
            live = list(range(len(chosen)))
            for _ in range(max_tokens):
                token_B = sample(logits_BV, sampling, generator)
                for row, token in zip(live, token_B.tolist(), strict=True):
                    outputs[chosen[row]].append(token)
                going = [place for place, token in enumerate(token_B.tolist()) if token not in self.stop_ids]
                if not going:
                    break
                live = [live[place] for place in going]
                logits_BV = batch.decode(token_B[going], going)
        return outputs


class _Batch:
    """The KV cache of some sequences [layer][B, G, C, D], written as they grow."""

    def __init__(self, model: Pocket, prompts: list[list[int]], max_tokens: int) -> None:
        self.model = model
        self.lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(self.lengths_B.max())
        self.ids_BP = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        config = model.config
        shape = (config.num_layers, len(prompts), config.num_kv_heads, longest + max_tokens, config.head_dim)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)

    def prefill(self) -> Tensor:
        """Logits after each prompt [B, V]."""
        num_seqs, longest = self.ids_BP.shape
        positions = torch.arange(longest).expand(num_seqs, longest)
        hidden = self._forward(self.ids_BP, positions)
        return self._logits(hidden[torch.arange(num_seqs), self.lengths_B - 1])

    def decode(self, token_B: Tensor, going: list[int]) -> Tensor:
        """Drop all sequences but `going`, append their tokens, return the next logits [B, V]."""
        if len(going) < len(self.lengths_B):
            self.keys, self.values = self.keys[:, going], self.values[:, going]
            self.lengths_B = self.lengths_B[going]
        hidden = self._forward(token_B[:, None], self.lengths_B[:, None])
        self.lengths_B = self.lengths_B + 1
        return self._logits(hidden[:, 0])

    def _logits(self, x_BH: Tensor) -> Tensor:
        model = self.model
        return F.linear(F.rms_norm(x_BH, x_BH.shape[-1:], model.norm, model.config.rms_norm_eps), model.lm_head)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Hidden states of new tokens, given [B, new] ids and their positions."""
        model, config = self.model, self.model.config
        num_seqs, num_new = ids.shape
        flat = positions.flatten()
        cos, sin = model.cos[flat], model.sin[flat]
        rows = torch.arange(num_seqs)[:, None]
        seen = int(positions.max()) + 1
        mask = torch.arange(seen) <= positions[:, None, :, None]
        x = F.embedding(ids, model.embed).flatten(0, 1)
        for index, layer in enumerate(model.decoder):
            attention = layer.attention
            normed = F.rms_norm(x, x.shape[-1:], layer.input_norm, config.rms_norm_eps)
            heads = F.linear(normed, attention.qkv).view(len(x), -1, config.head_dim)
            q, k, v = torch.split(heads, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
            q = norm_and_rotate(q, attention.q_norm, cos, sin, config.rms_norm_eps)
            k = norm_and_rotate(k, attention.k_norm, cos, sin, config.rms_norm_eps)
            shape = (num_seqs, num_new, -1, config.head_dim)
            self.keys[index, rows, :, positions] = k.view(shape)
            self.values[index, rows, :, positions] = v.view(shape)
            repeat = config.num_heads // config.num_kv_heads
            all_k, all_v = (
                cache[index, :, :, :seen].repeat_interleave(repeat, 1) for cache in (self.keys, self.values)
            )
            mixed = F.scaled_dot_product_attention(q.view(shape).transpose(1, 2), all_k, all_v, attn_mask=mask)
            x = x + attention.output(mixed.transpose(1, 2).reshape(len(x), -1))
            x = x + layer.experts(F.rms_norm(x, x.shape[-1:], layer.post_norm, config.rms_norm_eps))[0]
        return x.view(num_seqs, num_new, -1)
