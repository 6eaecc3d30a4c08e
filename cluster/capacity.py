"""Whether a layout's redundant experts make sense and fit, and a context that is asked for, before anything starts."""

from __future__ import annotations

import psutil

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from workers.config import Device, ModelConfig, ShardSpec
from workers.kv_memory import CPU_KV_BYTES, kv_token_bytes
from workers.placement_map import slots_per_rank

_GIB = 2**30


def check_redundant_experts(config: ClusterConfig, model: ModelConfig) -> None:
    """Raises ConfigError, with the numbers and what would do."""
    engine, num_places = config.engine, config.engine.layout.ep
    asked = engine.redundant_experts
    if not asked:
        return
    if not model.has_moe_layers:
        raise ConfigError(f"--redundant-experts {asked}: {config.model.name} has no experts; leave the flag out")
    most = model.num_experts * (num_places - 1)
    if asked > most:
        raise ConfigError(
            f"--redundant-experts {asked}: {model.num_experts} experts over {num_places} places have use for at most "
            f"{most} replicas; lower it, or raise --tp or --dp"
        )
    if engine.device != "cuda":
        _check_memory(config, model)


def device_with(config: ClusterConfig, num_gpus: int) -> Device:
    """ "auto" is a GPU where there is one for each rank of each copy. Raises ConfigError."""
    engine = config.engine
    if engine.device != "auto":
        return engine.device
    needed = config.router.copies * engine.layout.world_size
    if num_gpus < needed and engine.kv_dtype == "fp8":
        raise ConfigError(f"engine.kv_dtype fp8 needs {needed} GPUs, and there are {num_gpus}; leave it out")
    return "cuda" if num_gpus >= needed else "cpu"


def check_context(config: ClusterConfig, model: ModelConfig, device: Device | None) -> None:
    """Raises ConfigError where a context that was asked for is longer than the model's, or than KV memory holds.

    `device` None: not known yet, and what a GPU would do is not refused. A context that was not asked for is what there
    is room for; so it is where the ranks size their KV by what is free.
    """
    engine, asked = config.engine, config.engine.max_model_len
    if asked is None:
        return
    if asked > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {asked} is over the {model.max_position_embeddings} tokens that {config.model.name} was "
            "made for; lower it"
        )
    kv_bytes = engine.kv_memory_bytes or (CPU_KV_BYTES if device == "cpu" else None)
    if kv_bytes is None:
        return
    computed = 4 if device == "cpu" else 2
    itemsize = {"auto": computed, "bf16": 2, "fp8": 1}[engine.kv_dtype]
    block_bytes = engine.block_size * kv_token_bytes(model, ShardSpec(engine.layout, 0), itemsize)
    needed_bytes = -(-asked // engine.block_size) * block_bytes
    if needed_bytes > kv_bytes:
        raise ConfigError(
            f"--max-model-len {asked} needs {needed_bytes} bytes of KV on each rank, of which there are {kv_bytes}: "
            f"they hold {kv_bytes // block_bytes * engine.block_size} tokens; raise --kv-memory-bytes, or lower it"
        )


def _check_memory(config: ClusterConfig, model: ModelConfig) -> None:
    """Ranks on CPUs share this machine's memory. Counts weights as they are stored: no rank holds them in less."""
    size = slots_per_rank(model.num_experts, config.engine.redundant_experts, config.engine.layout.ep)
    num_slots = size * config.engine.layout.ep - model.num_experts
    needed, stored = num_slots * expert_bytes(model), _checkpoint_bytes(config)
    memory = psutil.virtual_memory().total
    if stored + needed > memory:
        fit = max(0, memory - stored) // expert_bytes(model)
        raise ConfigError(
            f"--redundant-experts {config.engine.redundant_experts} needs {needed / _GIB:.1f} GiB beside the model's "
            f"{stored / _GIB:.1f} GiB, this machine has {memory / _GIB:.1f} GiB; at most {fit} fit"
        )


def expert_bytes(model: ModelConfig) -> int:
    """One expert's weights in all layers, as the checkpoint stores them (without scales)."""
    num_layers = sum(model.is_moe_layer(layer) for layer in range(model.num_layers))
    itemsize = 1 if model.quantization is not None else 2
    return num_layers * 3 * model.hidden_size * model.moe_intermediate_size * itemsize


def _checkpoint_bytes(config: ClusterConfig) -> int:
    return sum(file.stat().st_size for file in config.model.path.glob("*.safetensors"))
