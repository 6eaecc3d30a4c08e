"""What every process of ours tells of itself: its version, and what the kernel knows of it."""

from __future__ import annotations

from importlib.metadata import version

from prometheus_client import CollectorRegistry, ProcessCollector

from cluster.metrics.plain import Labels, Reading, gauge

BUILD_INFO = gauge("mull_build_info", "1; its labels say which mull serves which model.", ("version", "model"))
CERTIFICATES = gauge(
    "mull_certificate_not_after_timestamp_seconds",
    "When a certificate in use ends: ports is the one that clients see, link that between gateways and Routers.",
    ("certificate",),
)


def register_process(registry: CollectorRegistry, model: str) -> None:
    """mull_build_info and process_*."""
    values: dict[Labels, float] = {(version("mull"), model): 1}
    registry.register(Reading(BUILD_INFO, lambda: values))
    ProcessCollector(registry=registry)
