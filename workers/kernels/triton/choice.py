"""Whether Triton's kernels compute on a device: on every GPU where triton is installed.

On a CPU they do so only for tests, in Triton's interpreter; it must be asked for before triton is imported.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

log = logging.getLogger(__name__)

CHOICE_VARIABLE = "MULL_GPU_KERNELS"
"""torch takes none of these kernels; interpret takes them on a CPU, too; unset, they compute on GPUs."""


@functools.cache
def has_triton(device_type: str) -> bool:
    """Whether these kernels take tensors of a device."""
    choice = os.environ.get(CHOICE_VARIABLE, "")
    if choice == "torch" or (device_type != "cuda" and choice != "interpret"):
        return False
    if importlib.util.find_spec("triton") is None:
        log.warning("GPU kernels: triton is not installed; torch computes, several times slower, on unpacked weights")
        return False
    return True
