"""build_app: the two Serve deployments of one model, wired.

Hop 0: what `mull serve`, a Helm install and the tests all run.
"""

from __future__ import annotations

from ray import serve

from cluster.config import ClusterConfig
from cluster.gateway.deployment import gateway_deployment
from cluster.router.deployment import router_deployment

APP_NAME = "mull"
GATEWAY = "Gateway"


def build_app(config: ClusterConfig) -> serve.Application:
    """One Gateway in front of one Router, which starts its own ranks."""
    router = router_deployment(config)
    return gateway_deployment(config, router)
