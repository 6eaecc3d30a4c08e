"""/v1/responses and /v1/completions: items, named events, and text that goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx

from cluster.errors import NotReady
from mull.v1 import generation_pb2 as pb
from tests.gateway_http.conftest import (
    CUT_IN_THOUGHTS,
    TWO_CALLS,
    Site,
    answer,
    finished,
    started,
    thought,
    thoughts_ended,
)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


async def test_a_response_has_reasoning_and_a_message(site: Site) -> None:
    reply = (await site.post("/v1/responses", {"input": "What is 2+2?", "metadata": {"a": "b"}})).json()

    reasoning, message = reply["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Two and two."}]
    assert message["content"][0]["text"] == "It is 4."
    assert (reply["status"], reply["object"], reply["metadata"]) == ("completed", "response", {"a": "b"})
    assert reply["usage"]["output_tokens_details"] == {"reasoning_tokens": 5}


async def test_a_cut_response_is_incomplete_and_says_why(site: Site) -> None:
    site.core.batches = CUT_IN_THOUGHTS
    reply = (await site.post("/v1/responses", {"input": "hi"})).json()

    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert reply["output"][0]["content"][0]["text"] == "Two and"


async def test_the_events_of_a_response_come_in_openais_order(site: Site) -> None:
    found = events(await site.post("/v1/responses", {"input": "hi", "stream": True}))

    assert [event["type"].removeprefix("response.") for event in found] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in found] == list(range(len(found)))


async def test_the_last_event_holds_what_a_plain_answer_would(site: Site) -> None:
    site.core.batches = TWO_CALLS
    tools = [{"type": "function", "name": "weather", "parameters": {}}]
    whole = (await site.post("/v1/responses", {"input": "hi", "tools": tools})).json()
    last = events(await site.post("/v1/responses", {"input": "hi", "tools": tools, "stream": True}))[-1]["response"]

    assert [item["type"] for item in whole["output"]] == ["reasoning", "function_call", "function_call"]
    assert whole["output"][1]["arguments"] == '{"city": "Ulm"}'
    for item in whole["output"] + last["output"]:
        del item["id"]
    assert last["output"] == whole["output"]


async def test_function_calls_stream_their_arguments(site: Site) -> None:
    site.core.batches = TWO_CALLS
    tools = [{"type": "function", "name": "weather", "parameters": {}}]
    found = events(await site.post("/v1/responses", {"input": "hi", "tools": tools, "stream": True}))

    deltas = [event for event in found if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(event["delta"] for event in deltas if event["output_index"] == 1) == '{"city": "Ulm"}'
    done = [event for event in found if event["type"] == "response.function_call_arguments.done"]
    assert [(event["name"], event["arguments"]) for event in done] == [("weather", '{"city": "Ulm"}'), ("clock", "{}")]


async def test_an_error_in_a_response_stream_is_a_failed_response(site: Site) -> None:
    site.core.batches = [[started(), thought("hm")], NotReady("the engine was lost")]
    found = events(await site.post("/v1/responses", {"input": "hi", "stream": True}))

    assert [event["type"] for event in found[-2:]] == ["response.failed", "error"]
    assert found[-1]["message"] == "the engine was lost"


async def test_responses_that_were_stored_elsewhere_are_refused(site: Site) -> None:
    reply = await site.post("/v1/responses", {"input": "hi", "previous_response_id": "resp_1"})

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "previous_response_id")


async def test_a_completion_is_text_with_its_tags(site: Site) -> None:
    reply = (await site.post("/v1/completions", {"prompt": "1 2<think>", "max_tokens": 5})).json()

    assert reply["object"] == "text_completion"
    assert reply["choices"][0]["text"] == "Two and two.\n</think>\n\nIt is 4."
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 8


async def test_a_completion_streams_with_logprobs_and_offsets(site: Site) -> None:
    entry = pb.Logprobs(logprob=-1, top=[pb.TopLogprob(token_id=41, text="J", logprob=-1)])
    site.core.batches = [
        [started(), thoughts_ended()],
        [answer("ab", logprobs=[entry]), answer("c", logprobs=[entry])],
        [finished(pb.Finished.REASON_STOP_TEXT, stop="END")],
    ]
    reply = await site.post("/v1/completions", {"prompt": "1", "logprobs": 1, "stream": True})

    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks]
    said = [choice for choice in choices if choice["logprobs"]]
    assert [choice["logprobs"]["text_offset"] for choice in said] == [[11], [13]]
    assert said[0]["logprobs"]["top_logprobs"] == [{"J": -1.0}]
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "END")
    assert reply.text.endswith("data: [DONE]\n\n")
