"""What the compiler makes of the GPU kernels for Hopper, at the shapes of the real models. A minute; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU kernels need triton: pip install triton")

SHARED_BYTES = 227 * 2**10
"""That a block of threads can have on Hopper."""
SPILL_BYTES = 16
"""Of a thread: four registers of a prompt's product, put away once for each split and not for each tile."""


@pytest.mark.hopper
def test_no_number_of_rows_that_is_served_waits_for_a_compiler(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tests.kernels_triton.serving_sizes"]
    told = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.hopper
@pytest.mark.timeout(600)
def test_kernels_fit_a_hopper_and_use_its_tensor_cores(tmp_path: Path) -> None:
    # The interpreter is chosen when triton is imported: compiling needs a process of its own.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "bench.gpu", "--build", "--out", str(tmp_path / "built.json")]
    subprocess.run(command, env=environment, check=True, timeout=500)
    kernels = json.loads((tmp_path / "built.json").read_text())["kernels"]
    assert {kernel["kernel"] for kernel in kernels} >= {"_fp8_gemm", "_grouped_gemm", "_attend_split", "_attend_chunks"}
    for kernel in kernels:
        assert kernel["spill_bytes"] <= SPILL_BYTES, kernel
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
        if "gemm" in kernel["kernel"]:
            assert "wgmma" in kernel["tensor_core"], kernel
            assert "e4m3.e4m3" in kernel["tensor_core"], kernel
