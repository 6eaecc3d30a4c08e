"""Streams with event ids: what comes after `Last-Event-ID`, and how long; and that an ordinary stream has none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from cluster.config import GatewayConfig
from tests.gateway.conftest import until
from tests.gateway_http.conftest import (
    ANSWER,
    WAIT_S,
    Site,
    answer,
    finished,
    question,
    started,
    thought,
    thoughts_ended,
)

RESUMABLE = {"stream": True, "stream_options": {"resumable": True, "include_usage": True}}
CHAT = "/v1/chat/completions"


@pytest.fixture
def retention_s() -> float:
    """Longer than any machine stands still, but in tests of its end."""
    return 600.0


@pytest.fixture
def http_config(retention_s: float) -> GatewayConfig:
    return GatewayConfig(http_port=0, stream_retention_s=retention_s, max_kept_streams=2, max_kept_stream_bytes=8192)


def events(text: str) -> list[tuple[str, str]]:
    """Ids and data; the last event may be cut."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((lines["id"], lines["data"]))
    return found


def content(found: list[tuple[str, str]]) -> str:
    chunks = [json.loads(data) for _, data in found if data != "[DONE]"]
    return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])


@asynccontextmanager
async def streaming(site: Site, **more: Any) -> AsyncIterator[AsyncIterator[str]]:
    """A resumable stream, as text."""
    async with site.client.stream("POST", CHAT, json=question(**RESUMABLE), **more) as response:
        assert response.status_code == 200, await response.aread()
        yield response.aiter_text()


async def after(site: Site, last_id: str, method: str = "GET", path: str = CHAT) -> httpx.Response:
    return await site.client.request(method, path, headers={"last-event-id": last_id})


async def test_every_event_has_an_id_and_the_rest_comes_after_any_of_them(site: Site) -> None:
    whole = events((await site.chat(**RESUMABLE)).text)
    assert whole[-1][1] == "[DONE]"
    stream_id = whole[0][0].rpartition(":")[0]
    assert [id_ for id_, _ in whole] == [f"{stream_id}:{number}" for number in range(len(whole))]
    for index, (id_, _) in enumerate(whole):
        for method in ("GET", "POST"):
            assert events((await after(site, id_, method)).text) == whole[index + 1 :]
    assert len(site.core.requests) == 1


async def test_a_client_that_was_cut_off_gets_what_came_meanwhile_and_what_comes_then(site: Site) -> None:
    go_on, end = asyncio.Event(), asyncio.Event()
    site.core.batches = [[started(), answer("one ")], go_on, [answer("two ")], end, [answer("three"), finished()]]
    async with streaming(site) as pieces:
        first = events(await anext(pieces))
    go_on.set()
    await until(lambda: site.core.num_yielded == 2, "what comes without a reader")
    assert not site.core.closed.is_set()
    rest = asyncio.create_task(after(site, first[-1][0]))
    await asyncio.sleep(0.01)
    end.set()
    assert content([*first, *events((await rest).text)]) == "one two three"


@pytest.mark.parametrize("retention_s", [0.3])
async def test_nobody_who_comes_back_is_a_cancel_after_the_retention_time(site: Site) -> None:
    site.core.batches = [[started(), answer("one ")], asyncio.Event()]
    async with streaming(site) as pieces:
        first = events(await anext(pieces))
    await asyncio.wait_for(site.core.closed.wait(), WAIT_S)
    gone = await after(site, first[-1][0])
    assert gone.status_code == 410
    assert gone.json()["error"]["code"] == "stream_gone"


async def test_a_plain_stream_has_no_ids_and_its_end_is_a_cancel_at_once(site: Site) -> None:
    site.core.batches = [[started(), answer("one ")], asyncio.Event()]
    async with site.client.stream("POST", CHAT, json=question(stream=True)) as response:
        assert "id:" not in await anext(response.aiter_text())
    await asyncio.wait_for(site.core.closed.wait(), WAIT_S)


@pytest.mark.parametrize(
    "bad", ["nothing", "0123:0", "", ":", "{stream}:x", "{stream}:-1", "{stream}:999", "{stream}:1e3"]
)
async def test_an_id_that_is_not_kept_is_gone(site: Site, bad: str) -> None:
    whole = events((await site.chat(**RESUMABLE)).text)
    refused = await after(site, bad.format(stream=whole[0][0].rpartition(":")[0]))
    assert refused.status_code == 410
    assert (await after(site, whole[0][0], path="/v1/completions")).status_code == 410


async def test_get_without_an_id_says_what_it_is_for(site: Site) -> None:
    refused = await site.client.get(CHAT)
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert "Last-Event-ID" in refused.json()["error"]["message"]


async def test_a_refused_request_has_its_own_status_and_is_not_kept(site: Site) -> None:
    site.core.batches = [ValueError("oops")]
    for _ in range(3):
        assert (await site.chat(**RESUMABLE)).status_code == 500
    site.core.batches = ANSWER
    assert (await site.chat(**RESUMABLE)).status_code == 200


async def test_the_buffer_is_bounded_and_the_oldest_events_go_first(site: Site) -> None:
    go_on = asyncio.Event()
    many = [[answer(f"{number} ")] for number in range(100)]
    site.core.batches = [[started(), answer("one ")], go_on, *many, [finished()]]
    async with streaming(site) as pieces:
        first = events(await anext(pieces))
    go_on.set()
    await asyncio.wait_for(site.core.closed.wait(), WAIT_S)
    late = await after(site, first[-1][0])
    assert late.status_code == 410
    assert "not kept any longer" in late.json()["error"]["message"]
    stream_id = first[0][0].rpartition(":")[0]
    rest = await after(site, f"{stream_id}:{len(first) + 95}")
    assert content(events(rest.text)) == "96 97 98 99 "


@pytest.mark.parametrize("retention_s", [0.3])
async def test_no_more_streams_are_kept_than_may_and_what_is_over_makes_room(site: Site) -> None:
    site.core.batches = [[started(), answer("one ")], asyncio.Event()]
    async with streaming(site) as one, streaming(site) as other:
        await anext(one)
        await anext(other)
        full = await site.chat(**RESUMABLE)
        assert full.status_code == 429
        assert "resumable" in full.json()["error"]["message"]
        site.core.closed.clear()
    await asyncio.wait_for(site.core.closed.wait(), WAIT_S)
    site.core.batches = ANSWER
    for _ in range(4):
        assert (await site.chat(**RESUMABLE)).status_code == 200


async def test_a_reader_that_is_there_gets_more_at_once_than_is_kept(site: Site) -> None:
    site.core.batches = [[started(), *[answer(f"{number} ") for number in range(100)], finished()]]
    whole = await site.chat(**RESUMABLE)
    assert len(whole.text) > 2 * site.config.max_kept_stream_bytes
    assert content(events(whole.text)) == "".join(f"{number} " for number in range(100))


async def test_a_newer_connection_takes_the_stream_over(site: Site) -> None:
    go_on = asyncio.Event()
    site.core.batches = [[started(), answer("one ")], go_on, [answer("two"), finished()]]
    async with streaming(site) as pieces:
        first = events(await anext(pieces))
        assert (await after(site, first[-1][0] + "9")).status_code == 410
        newer = asyncio.create_task(after(site, first[-1][0]))
        assert [piece async for piece in pieces] == []
        go_on.set()
        assert content(events((await newer).text)) == "two"


async def test_responses_and_thoughts_are_kept_as_well(site: Site) -> None:
    site.core.batches = [[started(), thought("hm")], [thoughts_ended(), answer("4"), finished()]]
    body = {"model": "pocket", "input": "hi", "stream": True, "stream_options": {"resumable": True}}
    text = (await site.client.post("/v1/responses", json=body)).text
    blocks = text.split("\n\n")[:-1]
    last = blocks[2].splitlines()[0].removeprefix("id: ")
    assert (await after(site, last, path="/v1/responses")).text == "".join(block + "\n\n" for block in blocks[3:])


async def test_a_server_that_stops_leaves_no_task(site: Site) -> None:
    site.core.batches = [[started(), answer("one ")], asyncio.Event()]
    async with streaming(site) as pieces:
        await anext(pieces)
    await site.server.stop()
    assert site.core.closed.is_set()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("kept stream")]
