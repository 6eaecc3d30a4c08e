"""A Ray of a test's own, in the test's process, with no more of its processes than `mull serve` starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from cluster.ray_node import LeanNode


@contextmanager
def own_ray(num_cpus: int, resources: dict[str, float] | None = None) -> Iterator[None]:
    """One node, at an address that others can reach, as those that others start; the test is its driver."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Serve's controller takes a worker as it is; all others ask for an environment.
    node = LeanNode(ray.util.get_node_ip_address(), num_cpus, resources, num_workers=1)
    try:
        ray.init(address=node.gcs_address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        node.stop()
