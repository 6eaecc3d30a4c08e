"""build_app: the two Serve deployments of one model, wired.

What `mull serve`, a Helm install and the tests all run.
"""

from __future__ import annotations

from ray import serve

from cluster.config import ClusterConfig
from cluster.gateway.deployment import gateway_deployment
from cluster.router.deployment import router_deployment

APP_NAME = "mull"


def build_app(config: ClusterConfig) -> serve.Application:
    """One Gateway in front of the Routers, each of which starts its own ranks."""
    return gateway_deployment(config, router_deployment(config))
