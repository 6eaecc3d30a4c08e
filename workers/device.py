"""What a rank's device is and has, and what of the config that means: decided once, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch

from workers.buckets import Buckets, decode_sizes
from workers.checkpoint import Checkpoint
from workers.config import ModelConfig, RunnerConfig, ShardSpec
from workers.errors import LayoutError
from workers.graphs import CallAgain, CudaRecorder, Recorder, interrupting
from workers.kernels.cpu.library import native
from workers.kernels.triton.choice import has_triton
from workers.parallel import ParallelState
from workers.step_memory import step_bytes

HALVED_FROM = 1024
"""On a GPU. Fewer rows take less time to travel than a second launch of each kernel takes."""


def device_of(config: RunnerConfig) -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of weights and KV there."""
    if config.device == "cuda":
        torch.cuda.set_device(config.rank % torch.cuda.device_count())
        return torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    return torch.device("cpu"), torch.float32


def halved_from(config: RunnerConfig, model: ModelConfig, device: torch.device) -> int | None:
    """Rows of the fullest group from which on a step is computed as two halves; None: none is."""
    if config.layout.dp == 1 or not model.has_moe_layers:
        return None
    if config.halved_from is None:
        return HALVED_FROM if device.type == "cuda" else None
    return config.halved_from or None


def buckets_of(model: ModelConfig, config: RunnerConfig, device: torch.device) -> Buckets | None:
    """The sizes of decode steps; None where none are recorded."""
    is_on = device.type == "cuda" and has_triton("cuda") if config.graphs == "auto" else config.graphs != "off"
    return decode_sizes(model, config.layout, config.max_num_seqs, config.max_model_len) if is_on else None


def recorder_of(config: RunnerConfig, parallel: ParallelState, device: torch.device) -> tuple[Recorder, ParallelState]:
    """What records decode steps, and the ranks' collectives as it needs them."""
    if device.type == "cpu":
        return CallAgain(), parallel
    recorder = CudaRecorder(parallel)
    is_whole = config.graphs == "whole" or (config.graphs == "auto" and config.layout.dp == 1)
    return recorder, parallel if is_whole else interrupting(parallel, recorder)


def held_by_steps(model: ModelConfig, config: RunnerConfig, buckets: Buckets | None, device: torch.device) -> int:
    """Bytes that are left to steps when KV is sized; on a CPU none, whose KV is small."""
    return 0 if device.type == "cpu" else step_bytes(model, config, buckets)


def check_kernels(config: RunnerConfig, device: torch.device) -> None:
    """Raises LayoutError where what is asked for has no kernel here."""
    is_cpu = device.type == "cpu" and native() is not None
    if config.kv_dtype == "fp8" and (is_cpu or not has_triton(device.type)):
        raise LayoutError(f"kv_dtype fp8 needs the GPU kernels, which do not compute on {device}; leave it out")
    if config.deterministic and not is_cpu and not has_triton(device.type):
        raise LayoutError(
            f"deterministic needs mull's own kernels, and torch computes on {device}; install triton for a GPU, or "
            "build the CPU's kernels"
        )
    if config.deterministic and config.redundant_experts:
        raise LayoutError(
            f"deterministic allows no redundant experts, and there are {config.redundant_experts}: which of them "
            "computes a token depends on its row; use 0"
        )


def check_memory(checkpoint: Checkpoint, spec: ShardSpec, device: torch.device) -> None:
    """Raises LayoutError where not even the stored bytes of this rank's weights fit; unpacked ones take no less."""
    spec.layout.check(checkpoint.config)
    num_free_bytes = free_bytes(device)
    needed_bytes = checkpoint.slice_bytes(spec)
    if needed_bytes <= num_free_bytes:
        return
    redundant = ""
    if spec.redundant_experts:
        extra_bytes = needed_bytes - checkpoint.slice_bytes(replace(spec, redundant_experts=0))
        redundant = f" ({extra_bytes / 1e9:.3g} of them for {spec.redundant_experts} redundant experts)"
    raise LayoutError(
        f"rank {spec.rank} of {spec.layout} needs {needed_bytes / 1e9:.3g} GB for its weights{redundant}, "
        f"{num_free_bytes / 1e9:.3g} are free; use more ranks or fewer redundant experts"
    )


def free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return psutil.virtual_memory().available
    num_free_bytes, _ = torch.cuda.mem_get_info(device)
    return num_free_bytes
