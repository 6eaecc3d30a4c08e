"""Compiles the GPU kernels for Hopper on a machine without a GPU, and reads what the compiler made of them.

Triton carries NVIDIA's assembler: a launch goes all the way to machine code here, and stops before the device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Built:
    """One kernel, compiled for one set of shapes."""

    kernel: str
    registers: int
    """Per thread."""
    spill_bytes: int
    """Of stack per thread, for what the registers did not hold."""
    shared_bytes: int
    warps: int
    tensor_core: str
    """The widest instruction that multiplies, or nothing."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class _Absent:
    """Stands where a driver would: it names the target and has no device behind it."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> str:
        return "cpu"


@contextmanager
def compiling() -> Iterator[Callable[[], list[Built]]]:
    """In it, launches compile for Hopper and do not run. Gives a function: what was compiled since its last call.

    For the rest of the process: Triton has no way back to having no driver.
    """
    run, seen = JITFunction.run, []

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        compiled = run(self, *args, **(options | {"warmup": True}))
        seen.append(compiled)
        return compiled

    def take() -> list[Built]:
        taken = [_read(compiled) for compiled in seen]
        seen.clear()
        return taken

    JITFunction.run = compile_only
    driver.set_active(_Absent())
    try:
        yield take
    finally:
        JITFunction.run = run


def _read(compiled: Any) -> Built:
    usage = _resource_usage(compiled.asm["cubin"])
    products = re.findall(
        r"(wgmma\.mma_async\S*\.(m\d+n\d+k\d+)\S*|mma\.sync\S*\.(m\d+n\d+k\d+)\S*)", compiled.asm["ptx"]
    )
    names = {re.sub(r"\.sync|\.aligned", "", match[0]) for match in products}
    return Built(
        kernel=compiled.metadata.name,
        registers=usage["REG"],
        spill_bytes=usage["STACK"],
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        tensor_core=", ".join(sorted(names)),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listed = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", listed.stdout)}
