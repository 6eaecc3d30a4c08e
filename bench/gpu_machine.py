"""What the figures of a GPU hang on: the GPU with its limits, and the versions of all that computes on it."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from typing import Any

import torch

from bench.report import versions

ASKED = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
"""The same name is sold with several limits of power."""
OPTIONAL = ("deep_gemm", "flash_attn_3", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "transformers")


def gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"gpu": None}
    about = torch.cuda.get_device_properties(device)
    size = {"gpu_memory_gb": about.total_memory / 1e9, "processors": about.multi_processor_count}
    return {"gpu": about.name} | size | _limits()


def _limits() -> dict[str, str]:
    """Nothing where there is no tool that tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    return dict(zip(ASKED, told.split(", "), strict=False)) if told else {}


def all_versions() -> dict[str, str]:
    """As far as it is installed."""
    found = {"cuda": str(torch.version.cuda)} | versions("torch", "triton")
    for name in OPTIONAL:
        try:
            found |= versions(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
