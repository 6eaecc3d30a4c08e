"""What a rank must know before it touches a weight: the model's dimensions, the layout and the runner's limits.

Read from config.json by the command line, the Router and every rank; no torch here, so that all of them can.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from workers.errors import CheckpointError
from workers.layout import ParallelLayout, ShardSpec

__all__ = ["Architecture", "ModelConfig", "ParallelLayout", "Quantization", "RunnerConfig", "ShardSpec"]

Architecture = Literal["qwen3", "qwen3_moe"]
ARCHITECTURES: dict[str, Architecture] = {"Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe"}
UNQUANTIZED_TILE = 128


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Block FP8: e4m3 weights with one scale per tile of `block_rows` × `block_cols`."""

    block_rows: int
    block_cols: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The dimensions of one checkpoint, as its config.json gives them."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None = None
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    mlp_only_layers: frozenset[int] = field(default_factory=frozenset)
    decoder_sparse_step: int = 1

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Read `path`/config.json. Raises CheckpointError naming the file, the field and the remedy."""
        return cls.from_file(Path(path) / "config.json")

    @classmethod
    def from_file(cls, file: Path) -> ModelConfig:
        """Read a config.json alone, by whatever name. Raises as `from_dir` does."""
        return _ConfigReader(file).model_config()

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer has experts: not listed as dense, and every `decoder_sparse_step`-th."""
        if self.num_experts == 0 or layer in self.mlp_only_layers:
            return False
        return (layer + 1) % self.decoder_sparse_step == 0

    @property
    def has_moe_layers(self) -> bool:
        return any(self.is_moe_layer(layer) for layer in range(self.num_layers))

    @property
    def has_dense_layers(self) -> bool:
        return not all(self.is_moe_layer(layer) for layer in range(self.num_layers))

    @property
    def tile_size(self) -> int:
        """Columns of a dense feed-forward layer that stay together on a rank."""
        return self._tile_size(self.intermediate_size)

    @property
    def num_ffn_tiles(self) -> int:
        return -(-self.intermediate_size // self.tile_size)

    @property
    def expert_tile_size(self) -> int:
        """Columns of an expert that stay together on a rank."""
        return self._tile_size(self.moe_intermediate_size)

    @property
    def num_expert_tiles(self) -> int:
        return -(-self.moe_intermediate_size // self.expert_tile_size)

    def _tile_size(self, num_columns: int) -> int:
        """They are rows of gate and up, and columns of down."""
        if self.quantization is not None:
            return math.lcm(self.quantization.block_rows, self.quantization.block_cols)
        tile = UNQUANTIZED_TILE
        while num_columns % tile:
            tile //= 2
        return tile

    @property
    def num_groups(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


Device = Literal["cpu", "cuda"]
Graphs = Literal["auto", "whole", "piecewise", "off"]
"""How decode steps are recorded, to be replayed: with the collectives in the recording, without them, or not at all.

auto: on a GPU with our kernels, whole where all ranks have the same tokens, else piecewise. A CPU records nothing;
whole and piecewise compute the same padded steps there, for tests.
"""


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """Everything one rank needs to load its slice and run plans. Picklable: it travels to the rank's process."""

    model_dir: str
    rank: int = 0
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    redundant_experts: int = 0
    """Copies of experts beyond the model's own, in each layer and over all ranks."""
    dispatch_rows: Literal["exact", "fp8"] = "exact"
    """How tokens travel to their experts: with every bit, or in a quarter to half of the bytes and rounded to FP8."""
    graphs: Graphs = "auto"
    kv_dtype: Literal["auto", "bf16", "fp8"] = "auto"
    """auto: that of the activations; bf16: half of the bytes on a CPU; fp8: e4m3, half of the bytes on a GPU."""
    deterministic: bool = False
    """A token's bits depend on what is before it alone: not on the batch, nor on how its sequence was computed."""
    device: Device = "cpu"
    products: Literal["fp32", "bf16"] = "fp32"
    """What a CPU multiplies: fp32, or rows rounded to bf16, which takes half the time where it can."""
    num_threads: int | None = None
    """CPU threads of this rank; None leaves torch's choice."""
    max_model_len: int = 4096
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 32
    kv_memory_bytes: int | None = None
    """KV pool of this rank; None takes a share of the free memory on a GPU and 256 MiB on a CPU."""
    halved_from: int | None = None
    """Tokens of the fullest attention group from which on a step is computed as two halves, of which one computes while
    the other's tokens travel to their experts. 0: none is; None: large ones on a GPU."""
    symmetric_memory: bool = True
    """GPUs of one host may sum by reading each other's memory."""
    host_kv_bytes: int = 0
    """Host memory of this rank for KV whose blocks are needed for others; 0: that is computed again."""

    @property
    def spec(self) -> ShardSpec:
        return ShardSpec(self.layout, self.rank, self.redundant_experts)


class _ConfigReader:
    """Takes typed values out of one config.json; every complaint names the file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values = self._load()

    def model_config(self) -> ModelConfig:
        architecture = self._architecture()
        self._refuse_unsupported()
        num_heads = self._positive("num_attention_heads")
        hidden_size = self._positive("hidden_size")
        num_layers, vocab_size = self._positive("num_hidden_layers"), self._positive("vocab_size")
        config = ModelConfig(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=self._positive("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=self._positive("num_key_value_heads", default=num_heads),
            head_dim=self._positive("head_dim", default=hidden_size // num_heads),
            rms_norm_eps=self._number("rms_norm_eps", default=1e-6),
            rope_theta=self._rope_theta(),
            max_position_embeddings=self._positive("max_position_embeddings"),
            tie_word_embeddings=self._flag("tie_word_embeddings"),
            eos_token_ids=self._below("eos_token_id", vocab_size, "token ids of the vocabulary"),
            quantization=self._quantization(),
            **(self._moe(num_layers) if architecture == "qwen3_moe" else {}),
        )
        if config.num_heads % config.num_kv_heads or config.head_dim % 2:
            raise self._error(
                f"{config.num_heads} heads over {config.num_kv_heads} KV heads of {config.head_dim} cannot be",
                "fix the config",
            )
        return config

    def _load(self) -> dict[str, Any]:
        if not self.file.parent.is_dir():
            raise CheckpointError(
                f"{self.file.parent}: no such model directory; give the path of a checkpoint directory"
            )
        if not self.file.is_file():
            raise self._error("missing", "point to a directory with config.json and safetensors files")
        try:
            values = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise self._error(f"not readable as JSON ({error})".replace("\n", " "), "download it again") from error
        if not isinstance(values, dict):
            raise self._error("not a JSON object", "download it again")
        return values

    def _architecture(self) -> Architecture:
        named = self.values.get("architectures")
        supported = ", ".join(ARCHITECTURES)
        if named not in [[name] for name in ARCHITECTURES]:
            raise self._error(f"unknown architecture {named!r}", f"mull serves {supported}")
        return ARCHITECTURES[named[0]]

    def _refuse_unsupported(self) -> None:
        """Features of other checkpoints that would give silently wrong output, and code of their own."""
        if self.values.get("auto_map"):
            raise self._error("auto_map asks for code of the checkpoint's own", "no such code is run: use another one")
        if self.values.get("attention_bias"):
            raise self._error("attention_bias is true", "only checkpoints without attention biases can be served")
        if self.values.get("use_sliding_window"):
            raise self._error("use_sliding_window is true", "only full attention can be served")
        if self.values.get("hidden_act", "silu") != "silu":
            raise self._error(f"hidden_act is {self.values['hidden_act']!r}", "only silu can be served")
        scaling = self._object("rope_parameters") or self._object("rope_scaling")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise self._error(
                f"RoPE scaling {kind!r} is not supported", "remove rope_scaling and serve the native context"
            )

    def _rope_theta(self) -> float:
        """Newer configs have it among the rope_parameters."""
        parameters = self._object("rope_parameters")
        return self._number("rope_theta", 10000.0, parameters if "rope_theta" in parameters else self.values)

    def _moe(self, num_layers: int) -> dict[str, Any]:
        num_experts = self._positive("num_experts", default=self.values.get("num_local_experts"))
        per_token = self._positive("num_experts_per_tok")
        if per_token > num_experts:
            raise self._error(f"num_experts_per_tok is {per_token}, num_experts {num_experts}", "fix the config")
        return {
            "num_experts": num_experts,
            "num_experts_per_token": per_token,
            "moe_intermediate_size": self._positive("moe_intermediate_size"),
            "norm_topk_prob": self._flag("norm_topk_prob"),
            "mlp_only_layers": frozenset(self._below("mlp_only_layers", num_layers, "layers of the model")),
            "decoder_sparse_step": self._positive("decoder_sparse_step", default=1),
        }

    def _quantization(self) -> Quantization | None:
        values = self.values.get("quantization_config")
        if values is None:
            return None
        remedy = "mull serves fp8 e4m3 checkpoints with weight_block_size and dynamic activations, and unquantised ones"
        method = values.get("quant_method") if isinstance(values, dict) else values
        if not isinstance(values, dict) or method != "fp8":
            raise self._error(f"unsupported quantization {method!r}", remedy)
        block = values.get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise self._error(f"unsupported weight_block_size {block!r}", remedy)
        if values.get("fmt", "e4m3") != "e4m3" or values.get("activation_scheme", "dynamic") != "dynamic":
            kind = f"{values.get('fmt')}/{values.get('activation_scheme')}"
            raise self._error(f"unsupported fp8 format {kind}", remedy)
        return Quantization(block_rows=block[0], block_cols=block[1])

    def _positive(self, name: str, default: object = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._error(f"{name} is {value!r}, not a positive integer", "fix or download the config again")
        return value

    def _number(self, name: str, default: float, values: Mapping[str, Any] | None = None) -> float:
        value = (self.values if values is None else values).get(name, default)
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self._error(f"{name} is {value!r}, not a positive number", "fix or download the config again")
        return float(value)

    def _flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._error(f"{name} is {value!r}, not true or false", "fix or download the config again")
        return bool(value)

    def _object(self, name: str) -> Mapping[str, Any]:
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self._error(f"{name} is {value!r}, not an object", "fix or download the config again")
        return value or {}

    def _below(self, name: str, stop: int, what: str) -> tuple[int, ...]:
        """One or several integers in [0, stop), or none."""
        value = self.values.get(name)
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(number) is int and 0 <= number < stop for number in numbers):
            raise self._error(
                f"{name} is {value!r}, not {what}, of which there are {stop}", "fix or download the config again"
            )
        return tuple(numbers)

    def _error(self, problem: str, remedy: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {problem}; {remedy}")
