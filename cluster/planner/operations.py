"""How long it takes to bring ranks, Routers and copies back, and what the control plane costs. Data: operations.toml.

The product's own bounds (how long a Router drains, how long copies must be full before another one starts) come from
its configuration.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.config import GatewayConfig, RouterConfig
from cluster.planner.devices import Device
from cluster.planner.layouts import Fit

_FILE = Path(__file__).parent / "data" / "operations.toml"
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Starting:
    """From nothing to ranks that take plans."""

    process_s: float
    disk_gb_s: float
    """Of a node."""
    warm_up_s: float
    node_s: float
    """Of a node with GPUs that autoscaling asks for, until a process can start there; 0: it stands ready."""

    def rank_s(self, fit: Fit) -> float:
        """One rank alone; the others keep their weights."""
        return self._seconds(fit, 1)

    def copy_s(self, fit: Fit, device: Device) -> float:
        """All ranks of a copy: those of a node share its disk."""
        return self._seconds(fit, min(fit.candidate.layout.world_size, device.ranks_per_node))

    def _seconds(self, fit: Fit, ranks_of_node: int) -> float:
        assert fit.work is not None, "it fits"
        return self.process_s + ranks_of_node * fit.work.weight_bytes / (self.disk_gb_s * _GB) + self.warm_up_s


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What Ray Serve does by itself."""

    health_period_s: float
    autoscaling_period_s: float
    rollout_share: float

    def rollout_size(self, num_copies: int) -> int:
        """Copies that are replaced at once."""
        return max(1, math.floor(self.rollout_share * num_copies))


@dataclass(frozen=True, kw_only=True)
class ControlPlane:
    """CPU time on one core."""

    gateway_message_us: float
    """A message of a Router, however many tokens are in it."""
    gateway_token_us: float
    gateway_flooded_token_us: float
    """Where messages pile up: several tokens share one."""
    router_message_us: float
    router_token_us: float


@dataclass(frozen=True, kw_only=True)
class Operations:
    """All of it."""

    starting: Starting
    serve: Serving
    control_plane: ControlPlane
    client_patience_s: float
    """How long a client tries again that finds no copy."""
    router: RouterConfig = field(default_factory=RouterConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)


def known_operations(*, node_s: float | None = None) -> Operations:
    """With the product's defaults. `node_s`: known better than the data says."""
    tables = tomllib.loads(_FILE.read_text())
    starting = _numbers(tables["starting"]) | ({} if node_s is None else {"node_s": node_s})
    return Operations(
        starting=Starting(**starting),
        serve=Serving(**_numbers(tables["serve"])),
        control_plane=ControlPlane(**_numbers(tables["control_plane"])),
        client_patience_s=_numbers(tables["clients"])["patience_s"],
    )


def described_operations() -> dict[str, dict[str, Any]]:
    """Each number with its source."""
    return {
        name: {"value": value, "source": table["sources"][name]}
        for table in tomllib.loads(_FILE.read_text()).values()
        for name, value in _numbers(table).items()
    }


def _numbers(table: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in table.items() if name != "sources"}
