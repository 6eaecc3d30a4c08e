"""A Router that has started, and what connects gateways to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from cluster.router.router import Router
from cluster.router.supervision import RestartPolicy
from tests.router.router_site import CONFIG, MAX_UNREAD, MODEL, WAIT_S, Connect, Gateway, Groups


@pytest.fixture
def groups() -> Groups:
    return Groups()


@pytest.fixture
async def router(groups: Groups) -> AsyncIterator[Router]:
    router = Router(
        MODEL, CONFIG, groups, restarts=RestartPolicy(max_restarts=3, first_backoff_s=0.001), max_unread=MAX_UNREAD
    )
    await router.start()
    yield router
    await router.stop()


@pytest.fixture
async def connect(router: Router) -> AsyncIterator[Connect]:
    opened: list[Gateway] = []

    async def open_gateway() -> Gateway:
        await asyncio.wait_for(router.wait_ready(), WAIT_S)
        opened.append(Gateway(router.address))
        return opened[-1]

    yield open_gateway
    for gateway in opened:
        await gateway.channel.close()
