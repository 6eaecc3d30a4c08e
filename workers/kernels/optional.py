"""Libraries of others whose kernels we take where they are installed, and which need not be."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

from workers.kernels.triton.choice import CHOICE_VARIABLE

log = logging.getLogger(__name__)

HOPPER = (9, 0)
"""Compute capability of the GPUs that both are for."""


@functools.cache
def installed(name: str) -> ModuleType | None:
    """The module, where there is a GPU for it; None where MULL_GPU_KERNELS says `triton`: ours alone."""
    if os.environ.get(CHOICE_VARIABLE, "") or not torch.cuda.is_available():
        return None
    if torch.cuda.get_device_capability() != HOPPER or importlib.util.find_spec(name) is None:
        return None
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:  # compiled for another torch, or another CUDA
        log.warning("GPU kernels: %s is installed and cannot be used (%s); ours compute in its place", name, error)
        return None
    log.info("GPU kernels: %s computes what it is faster at", name)
    return module
