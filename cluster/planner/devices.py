"""What ranks run on: peaks of the hardware, and what engines reach of them. Data: devices.toml, with sources."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from cluster.errors import ConfigError

_FILE = Path(__file__).parent / "data" / "devices.toml"
_KERNELS = "kernels"
_GIB = 2**30
CPU = "cpu"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, and its way to others."""

    name: str
    title: str
    memory_gib: float
    """Free before anything is loaded."""
    bandwidth_gb_s: float
    """Of memory, as a copy reaches it."""
    fp8_tflop_s: float
    bf16_tflop_s: float
    link_gb_s: float
    """To others of the same node, one way."""
    network_gb_s: float
    """To other nodes, one way."""
    ranks_per_node: int

    @property
    def kind(self) -> Literal["cpu", "cuda"]:
        """As the runner names it."""
        return "cpu" if self.name == CPU else "cuda"

    @property
    def kv_itemsize(self) -> int:
        """Bytes of a number in KV: fp32 on a CPU, bf16 on a GPU."""
        return 4 if self.kind == "cpu" else 2

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * _GIB)

    def as_json(self) -> dict[str, Any]:
        return {"title": self.title, "memory_bytes": self.memory_bytes, "constants": _with_sources(self, self.name)}


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Shares of the peaks that an engine reaches, and the time that has no peak."""

    weight_share: float
    """Of the bandwidth, where weights are read for few rows."""
    attention_share: float
    """Of the bandwidth, where many sequences decode and read their KV."""
    single_attention_share: float
    """The same of one sequence."""
    gemm_share: float
    """Of the FP8 peak, dense layers with many rows."""
    expert_gemm_tflop_s: float
    """Experts with many rows, as far as dense layers reach as much."""
    prefill_attention_share: float
    """Of the bf16 peak."""
    layer_overhead_us: float
    step_overhead_us: float
    collective_latency_us: float
    network_latency_us: float
    collective_share: float
    """Of a link's peak."""

    def as_json(self) -> dict[str, Any]:
        return _with_sources(self, _KERNELS)


def known_devices() -> list[str]:
    return sorted(name for name in _read() if name != _KERNELS)


def find_device(name: str) -> Device:
    """Raises ConfigError with the names that there are."""
    tables = _read()
    table = tables.get(name.lower())
    if table is None or name == _KERNELS:
        raise ConfigError(f"--gpu {name}: no constants for it; known are {', '.join(known_devices())}")
    return Device(name=name.lower(), **_values(table, Device, leave_out={"name"}))


def measured_cpu(memory_gib: float) -> Device:
    """A machine whose costs were fitted: its peaks are not asked for."""
    return Device(
        name=CPU,
        title="CPU as measured",
        memory_gib=memory_gib,
        bandwidth_gb_s=0.0,
        fp8_tflop_s=0.0,
        bf16_tflop_s=0.0,
        link_gb_s=0.0,
        network_gb_s=0.0,
        ranks_per_node=1,
    )


def published_kernels() -> Kernels:
    """What engines of the field reach."""
    return Kernels(**_values(_read()[_KERNELS], Kernels, leave_out=set()))


def sources(name: str) -> dict[str, str]:
    """Where each number of a device, or of the kernels, comes from."""
    found: dict[str, str] = _read().get(name, {}).get("sources", {})
    return found


def _with_sources(constants: Device | Kernels, name: str) -> dict[str, Any]:
    return {field: {"value": getattr(constants, field), "source": source} for field, source in sources(name).items()}


def _values(table: dict[str, Any], kind: type[Device] | type[Kernels], *, leave_out: set[str]) -> dict[str, Any]:
    return {field.name: table[field.name] for field in fields(kind) if field.name not in leave_out}


def _read() -> dict[str, dict[str, Any]]:
    return tomllib.loads(_FILE.read_text())
