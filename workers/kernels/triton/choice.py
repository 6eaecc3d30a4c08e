"""Whether Triton's kernels compute on a device: on every GPU that knows FP8, where triton is installed.

On a CPU they do so only for tests, in Triton's interpreter; it must be asked for before triton is imported.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

log = logging.getLogger(__name__)

CHOICE_VARIABLE = "MULL_GPU_KERNELS"
"""torch takes none of these kernels; interpret takes them on a CPU, too; triton takes them on GPUs, and no library of
others beside them; unset, they and those libraries compute on GPUs."""
FIRST_WITH_FP8 = (8, 9)
"""Compute capability of the first GPUs that convert e4m3: Ada. The kernels are cut for Hopper, 9.0."""


@functools.cache
def has_triton(device_type: str) -> bool:
    """Whether these kernels take tensors of a device."""
    choice = os.environ.get(CHOICE_VARIABLE, "")
    if choice == "torch" or (device_type != "cuda" and choice != "interpret"):
        return False
    if importlib.util.find_spec("triton") is None:
        log.warning("GPU kernels: triton is not installed; torch computes, several times slower, on unpacked weights")
        return False
    if device_type == "cuda" and torch.cuda.get_device_capability() < FIRST_WITH_FP8:
        log.warning("GPU kernels: none for this GPU, which has no FP8; torch computes, several times slower")
        return False
    return True
