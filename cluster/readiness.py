"""Readiness: a Serve deployment that has started when the model can take work.

Gateways and Routers start at once and load later, so that they can tell how far they are; Serve calls them RUNNING
meanwhile. With this one in the application, RUNNING means what a supervisor takes it for: KubeRay ends the old cluster
of an upgrade when the new one's applications are RUNNING.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from ray import serve
from ray.exceptions import RayError

from cluster.config import ClusterConfig
from cluster.errors import EngineError
from mull.v1 import generation_pb2 as pb

logger = logging.getLogger(__name__)

NAME = "Readiness"
_POLL_S = 1.0
_ASK_TIMEOUT_S = 10.0
_MARGIN_S = 60.0
"""Over `start_timeout_s`, for the gateway itself to start."""


class ReadinessDeployment:
    """Its constructor waits; then it has nothing to do."""

    async def __init__(self, start_timeout_s: float, gateway: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        await wait_until_ready(start_timeout_s, gateway)


async def wait_until_ready(start_timeout_s: float, gateway: Any) -> None:
    """Ask a gateway, by its handle, until it can take work.

    Raises EngineError, with the Routers' reason, where they cannot or do not start; Serve then tries again.
    """
    deadline_s = time.monotonic() + start_timeout_s + _MARGIN_S
    reason = "no gateway has answered"
    while time.monotonic() < deadline_s:
        try:
            reply = await asyncio.wait_for(gateway.info.remote(), _ASK_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            logger.info("no gateway answers: %s", error)
        else:
            info = pb.GetServerInfoResponse.FromString(reply)
            if info.ready:
                return
            if info.routers and all(router.failed for router in info.routers):
                raise EngineError(info.reason)
            reason = info.reason
        await asyncio.sleep(_POLL_S)
    raise EngineError(f"not ready within {start_timeout_s + _MARGIN_S:g} s: {reason}")


def readiness_deployment(config: ClusterConfig, gateway: serve.Application) -> serve.Application:
    """The root of an application that ends with `gateway`."""
    deployment: Any = serve.deployment(name=NAME, num_replicas=1, ray_actor_options={"num_cpus": 0})(
        ReadinessDeployment
    )
    application: serve.Application = deployment.bind(config.router.start_timeout_s, gateway)
    return application
