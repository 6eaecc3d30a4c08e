"""What gateways and Routers have to do for a fleet, in CPU time of one core, and where that ends.

Both are one process with one core that counts. A Router sends each gateway one message a step, with the tokens of all
streams that came through it: so a message costs the same however few streams a gateway has there, and many gateways
before many copies spend their time on messages with a token or two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.planner.operations import ControlPlane, Operations

BUSY = 0.7
"""Share of its core that a gateway should need at most on average."""
_MOST_GATEWAYS = 4096
_STREAMS_USED = 0.5
"""Share of its streams that a gateway should have open on average."""


@dataclass(frozen=True, kw_only=True)
class CopyTraffic:
    """What one copy gives in a second."""

    steps: float
    tokens: float

    def messages(self, num_gateways: int) -> float:
        """In each step one to each gateway that has streams in it, which are spread by chance."""
        if not self.steps:
            return 0.0
        streams = self.tokens / self.steps
        share: float = 1 - (1 - 1 / num_gateways) ** streams
        return self.steps * num_gateways * share


@dataclass(frozen=True, kw_only=True)
class Part:
    """How much of something is used, and how much there is."""

    part: str
    used: float
    limit: float | None
    """None: no bound is known."""
    unit: str
    words: str

    @property
    def is_over(self) -> bool:
        return self.limit is not None and self.used > self.limit

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_over": self.is_over}


def gateway_cpu(traffic: Sequence[CopyTraffic], num_gateways: int, costs: ControlPlane) -> float:
    """Cores that each gateway needs."""
    messages = sum(copy.messages(num_gateways) for copy in traffic) / num_gateways
    tokens = sum(copy.tokens for copy in traffic) / num_gateways
    return (messages * costs.gateway_message_us + tokens * costs.gateway_token_us) * 1e-6


def router_cpu(copy: CopyTraffic, num_gateways: int, costs: ControlPlane) -> float:
    """Cores that the Router of a copy needs."""
    return (copy.messages(num_gateways) * costs.router_message_us + copy.tokens * costs.router_token_us) * 1e-6


def gateways_for(traffic: Sequence[CopyTraffic], streams: float, operations: Operations) -> int:
    """So many that none of them is too busy, nor has too many streams."""
    count = max(1, -(-int(streams) // int(_STREAMS_USED * operations.gateway.max_streams)))
    while count < _MOST_GATEWAYS and gateway_cpu(traffic, count, operations.control_plane) > BUSY:
        count += max(1, count // 16)
    return count


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """The most that was seen of each, each at a moment of its own."""

    gateway_cpu: float
    router_cpu: float
    """Of one Router."""
    streams: float
    waiting: int
    """The longest queue of one copy."""


def control_plane(
    traffic: Sequence[CopyTraffic], num_gateways: int, peaks: Peaks, operations: Operations
) -> list[Part]:
    """`traffic`: when most tokens were streamed."""
    costs = operations.control_plane
    tokens = sum(copy.tokens for copy in traffic)
    streams = peaks.streams
    needed = gateways_for(traffic, streams, operations)
    return [
        Part(
            part="gateway's core",
            used=peaks.gateway_cpu,
            limit=1.0,
            unit="cores",
            words="where every token is a message of its own; past the limit they share messages",
        ),
        Part(
            part="gateway's tokens",
            used=tokens / num_gateways,
            limit=1e6 / costs.gateway_flooded_token_us,
            unit="tokens/s",
            words="all that a gateway can stream, with messages of several tokens",
        ),
        Part(
            part="gateway's streams",
            used=streams / num_gateways,
            limit=operations.gateway.max_streams,
            unit="streams",
            words="gateway.max_streams; one more is refused",
        ),
        Part(
            part="gateways",
            used=needed,
            limit=num_gateways,
            unit="gateways",
            words=f"so that none needs more than {BUSY:.0%} of a core, or {_STREAMS_USED:.0%} of its streams",
        ),
        Part(
            part="busiest Router's core",
            used=peaks.router_cpu,
            limit=1.0,
            unit="cores",
            words="steps are planned on it, too: past the limit they become longer",
        ),
        Part(
            part="links of gateways and Routers",
            used=num_gateways * len(traffic),
            limit=None,
            unit="sessions",
            words="each gateway has one to each Router; no bound was measured, nor one of Ray Serve's controller",
        ),
        Part(
            part="longest queue of a copy",
            used=peaks.waiting,
            limit=operations.router.max_waiting,
            unit="requests",
            words="router.max_waiting, and slots that KV has no room for; one more goes elsewhere, or is refused",
        ),
    ]
