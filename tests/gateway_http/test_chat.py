"""Chat completions over a real socket: events that a test wrote, as OpenAI's documents and chunks."""

from __future__ import annotations

from mull.v1 import generation_pb2 as pb
from tests.gateway_http.conftest import (
    ANSWER,
    CUT_IN_THOUGHTS,
    TWO_CALLS,
    Site,
    answer,
    finished,
    sse,
    started,
    thought,
    thoughts_ended,
)

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


async def test_thoughts_stand_beside_the_answer_under_both_names(site: Site) -> None:
    reply = (await site.chat()).json()

    message = reply["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": "It is 4.",
        "reasoning_content": "Two and two.",
        "reasoning": "Two and two.",
    }
    assert (reply["object"], reply["model"], reply["choices"][0]["finish_reason"]) == (
        "chat.completion",
        "pocket",
        "stop",
    )


async def test_usage_counts_thoughts_and_cached_tokens_apart(site: Site) -> None:
    usage = (await site.chat()).json()["usage"]

    assert usage == {
        "prompt_tokens": 12,
        "completion_tokens": 8,
        "total_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 8},
        "completion_tokens_details": {"reasoning_tokens": 5},
    }


async def test_output_cut_in_the_thoughts_has_empty_content_and_says_length(site: Site) -> None:
    site.core.batches = CUT_IN_THOUGHTS
    choice = (await site.chat()).json()["choices"][0]

    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert choice["message"]["reasoning_content"] == "Two and"


async def test_a_stream_begins_with_the_role_and_ends_with_the_reason_and_done(site: Site) -> None:
    reply = await site.chat(stream=True)

    deltas = [chunk["choices"][0]["delta"] for chunk in sse(reply)]
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "Two and two."
    assert "".join(delta.get("content", "") for delta in deltas) == "It is 4."
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in sse(reply)][-2:] == [None, "stop"]
    assert reply.text.endswith("data: [DONE]\n\n")


async def test_the_usage_of_a_stream_comes_last_where_it_was_asked_for(site: Site) -> None:
    chunks = sse(await site.chat(stream=True, stream_options={"include_usage": True}))

    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_tool_calls_stream_with_name_first_and_arguments_in_pieces(site: Site) -> None:
    site.core.batches = TWO_CALLS
    chunks = sse(await site.chat(stream=True, tools=[WEATHER]))

    calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert calls[0] == {
        "index": 0,
        "id": "call_0",
        "type": "function",
        "function": {"name": "weather", "arguments": ""},
    }
    assert "".join(call["function"]["arguments"] for call in calls if call["index"] == 0) == '{"city": "Ulm"}'
    assert calls[-1]["function"] == {"arguments": "{}"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_tool_calls_of_a_whole_answer_have_no_content_beside_them(site: Site) -> None:
    site.core.batches = TWO_CALLS
    choice = (await site.chat(tools=[WEATHER])).json()["choices"][0]

    assert choice["message"]["content"] is None
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Ulm"}'},
        {"name": "clock", "arguments": "{}"},
    ]
    assert choice["finish_reason"] == "tool_calls"


async def test_several_choices_keep_their_texts_apart(site: Site) -> None:
    site.core.batches = [
        [started(0), started(1)],
        [answer("one", 0), answer("two", 1)],
        [finished(choice=1), finished(choice=0)],
    ]
    reply = (await site.chat(n=2)).json()

    assert [choice["message"]["content"] for choice in reply["choices"]] == ["one", "two"]
    assert reply["usage"]["completion_tokens"] == 16
    assert reply["usage"]["prompt_tokens"] == 12
    chunks = sse(await site.chat(n=2, stream=True))
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1}


async def test_raw_text_has_the_closing_tag_in_the_content(site: Site) -> None:
    whole = (await site.chat(separate_reasoning=False)).json()["choices"][0]["message"]
    chunks = sse(await site.chat(separate_reasoning=False, stream=True))

    raw = "Two and two.\n</think>\n\nIt is 4."
    assert whole == {"role": "assistant", "content": raw}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == raw
    assert site.asked.raw_tool_calls


async def test_raw_text_of_cut_thoughts_has_no_closing_tag(site: Site) -> None:
    site.core.batches = CUT_IN_THOUGHTS

    assert (await site.chat(separate_reasoning=False)).json()["choices"][0]["message"]["content"] == "Two and"


async def test_logprobs_name_tokens_their_bytes_and_the_likeliest(site: Site) -> None:
    entry = pb.Logprobs(logprob=-0.5, top=[pb.TopLogprob(token_id=41, text="J", logprob=-0.5)])
    site.core.batches = [
        [started(), thought("x", logprobs=[entry]), thoughts_ended()],
        [answer("y", logprobs=[entry])],
        [finished()],
    ]
    logprobs = (await site.chat(logprobs=True, top_logprobs=1)).json()["choices"][0]["logprobs"]

    token = site.core.model.tokenizer.decode([41])
    likeliest = {"token": token, "logprob": -0.5, "bytes": [*token.encode()]}
    assert logprobs["content"] == [{**likeliest, "top_logprobs": [likeliest]}]
    assert len(logprobs["reasoning_content"]) == 1
    assert site.asked.sampling.logprobs == 1
    chunks = sse(await site.chat(logprobs=True, stream=True))
    assert sum(len((c["choices"][0]["logprobs"] or {}).get("content", [])) for c in chunks) == 1


async def test_notes_of_the_finish_reach_the_client(site: Site) -> None:
    site.core.batches = [[started(), answer("<tool_call>{"), finished(notes=["a tool call could not be read"])]]

    assert (await site.chat()).json()["choices"][0]["notes"] == ["a tool call could not be read"]


async def test_the_request_id_of_the_client_comes_back(site: Site) -> None:
    reply = await site.client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]}, headers={"x-request-id": "mine"}
    )

    assert reply.headers["x-request-id"] == "mine"
    assert (reply.json()["id"], site.asked.request_id) == ("chatcmpl-mine", "mine")


async def test_every_cut_of_the_events_into_batches_gives_the_same_text(site: Site) -> None:
    events = [event for batch in ANSWER for event in batch]
    texts = set()
    for size in range(1, len(events) + 1):
        site.core.batches = [events[i : i + size] for i in range(0, len(events), size)]
        deltas = [chunk["choices"][0]["delta"] for chunk in sse(await site.chat(stream=True))]
        texts.add("".join(delta.get("reasoning", "") + delta.get("content", "") for delta in deltas))

    assert texts == {"Two and two.It is 4."}
