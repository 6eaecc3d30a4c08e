"""What a gateway counts and times, read from its metrics port."""

from __future__ import annotations

import grpc
import pytest

from cluster.gateway.served_model import ServedModel
from cluster.metrics.gateway import SPECS
from mull.v1 import router_pb2
from tests.gateway.conftest import RunningGateway, ask, kinds, until
from tests.gateway.scripted_router import ScriptedRouter, update
from tests.scraping import Scrape, check_against_table, check_as_prometheus_does, scraped

STOP, LENGTH = router_pb2.End.REASON_STOP, router_pb2.End.REASON_LENGTH
END_OF_TURN = 1000


def answer(router: ScriptedRouter, *updates: tuple[list[int], dict[str, object]]) -> None:
    """Let every request be answered with these updates."""
    router.on_submit = lambda submit: router.send(*(update(submit.key, ids, **more) for ids, more in updates))  # type: ignore[arg-type]  # as the test says


async def finish(gateway: RunningGateway, **more: object) -> Scrape:
    """One request to its end, and what the gateway tells then."""
    assert kinds([event async for event in gateway.stub.Generate(ask(**more))])[-1] == "finished"
    await until(lambda: gateway.server.num_streams == 0, "the stream's end")
    return await scrape_of(gateway)


async def scrape_of(gateway: RunningGateway) -> Scrape:
    return await scraped(f"127.0.0.1:{gateway.ports.metrics}")


async def test_tokens_are_counted_by_phase_and_requests_by_how_they_finish(
    gateway: RunningGateway, model: ServedModel
) -> None:
    ids = [40, 41, model.tags.close_id, 42, END_OF_TURN]
    answer(gateway.router, (ids, {"admitted": 4, "end": STOP}))

    said = await finish(gateway)

    assert said.one("mull_generation_tokens_total", phase="thinking", tenant="") == 3
    assert said.one("mull_generation_tokens_total", phase="answer", tenant="") == 2
    assert said.one("mull_requests_finished_total", finish_reason="stop", phase="answer", tenant="") == 1
    assert said.one("mull_thinking_ended_total", reason="natural") == 1
    assert said.one("mull_cached_prompt_tokens_total", tenant="") == 4
    assert said.one("mull_prompt_tokens_total", tenant="") == said.one("mull_request_prompt_tokens_sum") > 4
    assert (said.one("mull_thinking_tokens_sum"), said.one("mull_answer_tokens_sum")) == (3, 2)


async def test_a_request_cut_in_thought_says_so_and_has_no_time_to_its_answer(gateway: RunningGateway) -> None:
    answer(gateway.router, ([40], {"admitted": 0}), ([41], {"end": LENGTH}))

    said = await finish(gateway)

    assert said.one("mull_requests_finished_total", finish_reason="length", phase="thinking", tenant="") == 1
    assert said.one("mull_thinking_ended_total", reason="length") == 1
    assert said.one("mull_time_to_first_token_seconds_count") == 1
    assert said.one("mull_time_to_first_answer_seconds_count") == 0
    assert said.one("mull_thinking_seconds_count") == said.one("mull_e2e_request_latency_seconds_count") == 1
    assert sum(said.all("mull_requests_finished_total").values()) == 1


async def test_tokens_that_close_thoughts_at_the_end_of_their_budget_are_counted_as_forced(
    gateway: RunningGateway, model: ServedModel
) -> None:
    closing = [41, 42, model.tags.close_id]
    forced = {"num_forced": len(closing)}
    answer(gateway.router, ([40], {"admitted": 0}), (closing, forced), ([43, END_OF_TURN], {"end": STOP}))

    said = await finish(gateway, thinking_budget=1)

    assert said.one("mull_thinking_ended_total", reason="budget") == 1
    assert said.one("mull_budget_forced_tokens_total") == len(closing)


async def test_a_request_that_fails_is_counted_by_its_code(gateway: RunningGateway) -> None:
    before = await scrape_of(gateway)
    assert before.one("mull_requests_failed_total", code="INVALID_ARGUMENT", tenant="") == 0

    with pytest.raises(grpc.aio.AioRpcError):
        await gateway.stub.Generate(ask(thinking_budget=5, max_tokens=4)).read()

    said = await scrape_of(gateway)
    assert said.one("mull_requests_failed_total", code="INVALID_ARGUMENT", tenant="") == 1
    assert sum(said.all("mull_requests_finished_total").values()) == 0


async def test_it_tells_whether_it_takes_work_and_how_many_of_its_routers_do(gateway: RunningGateway) -> None:
    said = await scrape_of(gateway)
    assert said.one("mull_gateway_ready") == 1
    assert said.all("mull_copies") == {("ready",): 1, ("not_ready",): 0}

    gateway.router.description.ready = False
    await until(lambda: not gateway.server.copies.state.ready, "the Router to be known as not ready")

    said = await scrape_of(gateway)
    assert said.one("mull_gateway_ready") == 0
    assert said.all("mull_copies") == {("ready",): 0, ("not_ready",): 1}


async def test_streams_are_counted_while_they_are_open(gateway: RunningGateway) -> None:
    call = gateway.stub.Generate(ask())
    await gateway.router.submitted()

    assert (await scrape_of(gateway)).one("mull_streams_open") == 1

    call.cancel()
    await until(lambda: gateway.server.num_streams == 0, "the stream's end")
    said = await scrape_of(gateway)
    assert said.one("mull_streams_open") == 0
    assert said.one("mull_requests_failed_total", code="CANCELLED", tenant="") == 1


async def test_a_request_whose_router_drains_stands_still_and_is_sent_again(gateway: RunningGateway) -> None:
    # given: two tokens, and then the Router must go
    router = gateway.router
    call = gateway.stub.Generate(ask(max_tokens=3))
    first = await router.submitted()
    gave_back = update(first.key, [40, 41], admitted=0, end=router_pb2.End.REASON_UNAVAILABLE, message="stopping")
    # when: it takes it again
    router.send(gave_back)
    second = await router.submitted(2)
    router.send(update(second.key, [42], end=LENGTH))
    assert kinds([event async for event in call])[-1] == "finished"
    # then
    said = await scrape_of(gateway)
    assert said.one("mull_recovery_pause_seconds_count", cause="router_draining") == 1
    assert said.one("mull_recovery_pause_seconds_count", cause="router_lost") == 0
    assert said.all("mull_replayed_tokens_total") == {
        ("router_lost",): 0,
        ("router_draining",): len(first.prompt_ids) + 2,
        ("client_resumed",): 0,
    }


async def test_what_the_port_says_names_the_version_and_the_process(gateway: RunningGateway) -> None:
    said = await scrape_of(gateway)

    assert [labels[0] for labels in said.all("mull_build_info")] == ["pocket"]
    assert said.one("process_resident_memory_bytes") > 2**20


async def test_the_port_serves_what_its_table_says(gateway: RunningGateway) -> None:
    check_against_table(await scrape_of(gateway), SPECS)


async def test_prometheus_has_no_complaint(gateway: RunningGateway) -> None:
    answer(gateway.router, ([40], {"admitted": 0, "end": LENGTH}))
    check_as_prometheus_does(await finish(gateway))
