"""Finds the compiled kernels for this machine's CPU and declares their functions.

Plain C functions on pointers, called through ctypes: no dependency on a torch version, neither to build nor to run.
They use the OpenMP runtime that torch has loaded, and its number of threads. Where nothing was compiled, or the CPU is
too old, the kernels fall back to torch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sysconfig
from pathlib import Path

import torch

from workers.errors import KernelError

log = logging.getLogger(__name__)

CHOICE_VARIABLE = "MULL_CPU_KERNELS"
"""One of BUILDS takes these kernels, torch none of them; unset, the best that the CPU can run."""
ABI = 4
"""`MULL_ABI` of native/kernels.h."""
BUILDS = {
    "avx512bf16": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vbmi", "avx512_bf16"),
    "avx512vbmi": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vbmi"),
    "avx512": ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl"),
    "avx2": ("avx2", "fma3", "f16c"),
}
"""Best first, and what a CPU must have for them."""

VALUE_KINDS = {torch.bfloat16: 1, torch.float32: 2}
"""`Kind` of native/weight.h, of what the KV pool holds."""

_pointer, _int, _float, _flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32
SIGNATURES = {
    "mull_linear": (_pointer, _int, _int, _pointer, _pointer, _int),
    "mull_pack": (_pointer, _int, _int, _int, _int, _int, _flag, _pointer),
    "mull_experts": (_pointer, _int, _int, _pointer, _pointer, _int, _pointer, _pointer, _int, _pointer),
    "mull_rms_norm": (_pointer, _int, _int, _int, _pointer, _float, _pointer),
    "mull_add_rms_norm": (_pointer, _pointer, _int, _int, _pointer, _float, _pointer),
    "mull_rotate_and_store": (
        *(_pointer, _int, _int, _int, _int, _int),
        *(_pointer, _float, _pointer, _pointer, _flag, _int, _pointer),
    ),
    "mull_choose_experts": (_pointer, _int, _int, _int, _int, _flag, _pointer, _pointer),
    "mull_decode_attention": (
        *(_pointer, _int, _int, _int, _int, _int),
        *(_pointer, _flag, _int, _int, _pointer, _int, _pointer, _pointer),
    ),
    "mull_prefill_attention": (
        *(_pointer, _int, _int, _pointer, _pointer, _int, _int, _int),
        *(_pointer, _flag, _int, _int, _pointer, _int, _pointer),
    ),
    "mull_attention_half": (_pointer, _pointer, _pointer, _pointer, _pointer, _flag, _pointer),
    "mull_feed_forward_half": (_pointer, _pointer, _int, _pointer, _pointer),
    "mull_layers": (_pointer, _pointer, _int, _pointer, _pointer),
    "mull_host_all_reduce": (_pointer, _pointer, _int),
    "mull_host_all_gather": (_pointer, _pointer, _int, _pointer),
    "mull_host_all_to_all": (_pointer, _pointer, _pointer, _pointer, _pointer),
}
"""Argument types. Functions of a group return the rank that was late, the others nothing."""


def runnable() -> tuple[str, ...]:
    """The builds that this CPU can run, best first."""
    has = torch.cpu.get_capabilities()
    return tuple(build for build, needed in BUILDS.items() if all(has.get(name) for name in needed))


def build() -> str | None:
    """The best that was compiled and that this CPU can run."""
    return next((name for name in _wanted() if _file(name).exists()), None)


@functools.cache
def native() -> ctypes.CDLL | None:
    """The library for this CPU, or None: then torch computes, and the log says why."""
    found = build()
    if found is not None:
        return _declared(_file(found))
    needed = _wanted() or "no AVX2"
    log.warning("CPU kernels: none for this machine (%s); torch computes, several times slower", needed)
    return None


def multiplies_bf16() -> bool:
    """Whether the kernels have products of bf16."""
    return build() == "avx512bf16"


def _wanted() -> tuple[str, ...]:
    choice = os.environ.get(CHOICE_VARIABLE, "")
    return (choice,) if choice else runnable()


def _file(name: str) -> Path:
    return Path(__file__).parent / f"native_{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _declared(file: Path) -> ctypes.CDLL:
    """Raises KernelError where it was compiled from other sources than these."""
    library = ctypes.CDLL(str(file))
    abi = library.mull_abi() if hasattr(library, "mull_abi") else 1
    if abi != ABI:
        raise KernelError(f"{file} has version {abi} of the kernels, mull needs {ABI}; compile it: pip install -e .")
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, _flag if "host" in name else None
    return library
