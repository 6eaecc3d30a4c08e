"""Whether requests are traced, and which span of whom caused one: W3C Trace Context, without the SDK.

Off where the configuration names no collector; nothing of OpenTelemetry is imported then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.config import TracingConfig

if TYPE_CHECKING:
    from cluster.spans import Tracing

HEADER = "traceparent"
"""Of gRPC metadata and of HTTP alike."""
_SHAPE = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True)
class TraceParent:
    """Which span caused a request."""

    trace_id: int
    span_id: int
    flags: int

    @classmethod
    def parse(cls, header: str | None) -> TraceParent | None:
        """None where there is none, or one that cannot be read: the standard asks to go on without it."""
        found = _SHAPE.fullmatch(header.strip()) if header else None
        return None if found is None else cls(*(int(found[part], 16) for part in (1, 2, 3)))

    def __str__(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.flags:02x}"


def start_tracing(config: TracingConfig, process: str) -> Tracing | None:
    """None where tracing is off. `process` tells services apart, as mull-PROCESS."""
    if config.otlp_endpoint is None:
        return None
    from cluster.spans import Exporting, Tracing

    return Tracing(Exporting(config.otlp_endpoint, config.sample_ratio), process)
