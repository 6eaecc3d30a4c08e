"""How exchanges end early: a client that goes, one that does not read, a server that stops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from tests.gateway.conftest import until
from tests.gateway_http.conftest import ANSWER, WAIT_S, Site, finished, question, sse, started, thought


@asynccontextmanager
async def raw_post(site: Site, **fields: object) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A request on a socket of its own, of which nothing is read by itself."""
    at = urlsplit(site.url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port, limit=1024)
    body = json.dumps(question(**fields)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: mull\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    try:
        yield reader, writer
    finally:
        writer.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_cancels_its_generation(site: Site, stream: bool) -> None:
    site.core.batches = [[started(), thought("hm")], asyncio.Event()]
    async with raw_post(site, stream=stream) as (reader, _writer):
        if stream:
            await reader.readuntil(b"hm")
        else:
            await until(lambda: site.core.num_yielded > 0, "the first events")

    await asyncio.wait_for(site.core.closed.wait(), WAIT_S)


async def test_a_client_that_does_not_read_holds_its_stream_back(site: Site) -> None:
    text = "x" * 10_000
    site.core.batches = [[started()], *([thought(text)] for _ in range(5000)), [finished()]]
    async with raw_post(site, stream=True):
        last = -1
        while site.core.num_yielded != last or not last:
            last = site.core.num_yielded
            await asyncio.sleep(0.3)

        # 50 MB were to be had; the buffers of two sockets took what they hold.
        assert 0 < last < 2500
    await asyncio.wait_for(site.core.closed.wait(), WAIT_S)


async def test_a_server_that_stops_tells_the_streams_it_cuts(site: Site) -> None:
    site.core.batches = [[started(), thought("hm")], asyncio.Event()]
    async with site.client.stream("POST", "/v1/chat/completions", json=question(stream=True)) as reply:
        lines = reply.aiter_lines()
        while "hm" not in await anext(lines):
            pass
        stopping = asyncio.create_task(site.server.stop())
        rest = [line async for line in lines]
        await stopping

    assert any("shutting down" in line for line in rest)
    assert site.core.closed.is_set()


async def test_a_connection_serves_one_request_after_another(site: Site) -> None:
    for _ in range(3):
        assert sse(await site.chat(stream=True))[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(site.core.requests) == 3


async def test_streams_side_by_side_do_not_mix(site: Site) -> None:
    site.core.batches = ANSWER
    replies = await asyncio.gather(*(site.chat(stream=True) for _ in range(20)))

    assert len({json.dumps([c["choices"] for c in sse(reply)]) for reply in replies}) == 1
    assert len({sse(reply)[0]["id"] for reply in replies}) == 20
