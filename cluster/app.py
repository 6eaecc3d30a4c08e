"""build_app: the Serve deployments of one model, wired.

What `mull serve`, a Helm install and the tests all run; `build` is what a Serve config names as its `import_path`.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from cluster.config import ClusterConfig
from cluster.flags import config_from_values
from cluster.gateway.deployment import gateway_deployment
from cluster.readiness import readiness_deployment
from cluster.router.deployment import router_deployment

APP_NAME = "mull"


def build_app(config: ClusterConfig) -> serve.Application:
    """One Gateway in front of the Routers, each of which starts its own ranks."""
    return gateway_deployment(config, router_deployment(config))


def build(args: dict[str, Any]) -> serve.Application:
    """The same from the nested values of a Serve config's `args`, RUNNING only when it can take work.

    Raises ConfigError for values that are wrong.
    """
    config = config_from_values(args)
    return readiness_deployment(config, build_app(config))
