"""OpenAI's own Python client against the server: what it parses is what the events said."""

from __future__ import annotations

import asyncio

import openai
import pydantic
import pytest

from cluster.errors import NotReady, Overloaded
from tests.gateway_http.conftest import (
    TWO_CALLS,
    Site,
    answer,
    finished,
    question,
    started,
    thought,
    thoughts_ended,
)

USER = question()["messages"]
TOOLS = [{"type": "function", "function": {"name": "weather", "strict": True, "parameters": {"type": "object"}}}]


class Sum(pydantic.BaseModel):
    total: int


SUM = [[started(), thought("hm"), thoughts_ended()], [answer('{"total"'), answer(": 4}")], [finished()]]


@pytest.fixture
def client(site: Site) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{site.url}/v1", api_key="none", max_retries=0)


async def test_the_sync_client_reads_thoughts_answer_and_usage(site: Site) -> None:
    def ask() -> openai.types.chat.ChatCompletion:
        with openai.OpenAI(base_url=f"{site.url}/v1", api_key="none") as client:
            return client.chat.completions.create(model="pocket", messages=USER)

    done = await asyncio.to_thread(ask)

    assert done.choices[0].message.content == "It is 4."
    assert done.choices[0].message.reasoning_content == "Two and two."
    assert done.usage.completion_tokens_details.reasoning_tokens == 5
    assert done.usage.prompt_tokens_details.cached_tokens == 8


async def test_a_stream_of_the_sync_client(site: Site) -> None:
    def ask() -> str:
        with openai.OpenAI(base_url=f"{site.url}/v1", api_key="none") as client:
            stream = client.chat.completions.create(model="pocket", messages=USER, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == "It is 4."


async def test_the_stream_helper_accumulates_a_completion(client: openai.AsyncOpenAI) -> None:
    options = {"include_usage": True}
    async with client.chat.completions.stream(model="pocket", messages=USER, stream_options=options) as stream:
        kinds = [event.type async for event in stream]
        done = await stream.get_final_completion()

    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert done.choices[0].message.content == "It is 4."
    assert done.usage.total_tokens == 20


async def test_tool_calls_stream_through_the_helper(site: Site, client: openai.AsyncOpenAI) -> None:
    site.core.batches = TWO_CALLS
    async with client.chat.completions.stream(model="pocket", messages=USER, tools=TOOLS) as stream:
        kinds = [event.type async for event in stream]
        done = await stream.get_final_completion()

    assert "tool_calls.function.arguments.delta" in kinds
    assert [call.function.name for call in done.choices[0].message.tool_calls] == ["weather", "clock"]
    assert done.choices[0].message.tool_calls[0].function.arguments == '{"city": "Ulm"}'
    assert done.choices[0].finish_reason == "tool_calls"


async def test_the_parse_helper_gives_an_object(site: Site, client: openai.AsyncOpenAI) -> None:
    site.core.batches = SUM
    done = await client.chat.completions.parse(model="pocket", messages=USER, response_format=Sum)

    assert done.choices[0].message.parsed == Sum(total=4)
    assert '"total"' in site.asked.response_format.json_schema


async def test_extra_fields_travel_in_the_extra_body(site: Site, client: openai.AsyncOpenAI) -> None:
    extra = {"top_k": 5, "thinking_budget": 7, "guided_choice": ["yes", "no"]}
    await client.chat.completions.create(model="pocket", messages=USER, extra_body=extra)

    assert (site.asked.sampling.top_k, site.asked.thinking_budget) == (5, 7)
    assert list(site.asked.response_format.choices.texts) == ["yes", "no"]


async def test_a_response_and_its_text(client: openai.AsyncOpenAI) -> None:
    done = await client.responses.create(model="pocket", input="What is 2+2?")

    assert done.output_text == "It is 4."
    assert done.output[0].content[0].text == "Two and two."
    assert done.usage.output_tokens_details.reasoning_tokens == 5


async def test_a_response_streams_through_the_helper(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="pocket", input="What is 2+2?") as stream:
        kinds = [event.type async for event in stream]
        done = await stream.get_final_response()

    assert kinds[0] == "response.created"
    assert {"response.reasoning_text.delta", "response.output_text.delta"} <= set(kinds)
    assert kinds[-1] == "response.completed"
    assert done.output_text == "It is 4."


async def test_function_calls_of_a_response_stream_through_the_helper(site: Site, client: openai.AsyncOpenAI) -> None:
    site.core.batches = TWO_CALLS
    tools = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}]
    async with client.responses.stream(model="pocket", input="hi", tools=tools) as stream:
        async for _ in stream:
            pass
        done = await stream.get_final_response()

    assert [(item.name, item.arguments) for item in done.output if item.type == "function_call"] == [
        ("weather", '{"city": "Ulm"}'),
        ("clock", "{}"),
    ]


async def test_a_response_is_parsed(site: Site, client: openai.AsyncOpenAI) -> None:
    site.core.batches = SUM
    done = await client.responses.parse(model="pocket", input="hi", text_format=Sum)

    assert done.output_parsed == Sum(total=4)


async def test_completions_and_models(client: openai.AsyncOpenAI) -> None:
    done = await client.completions.create(model="pocket", prompt="1 2 3")

    assert done.choices[0].text.endswith("It is 4.")
    assert [model.id async for model in client.models.list()] == ["pocket"]


async def test_errors_are_those_of_the_client(site: Site, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
        await client.chat.completions.create(model="pocket", messages=USER, temperature="hot")
    assert wrong.value.param == "temperature"
    site.core.batches = [Overloaded("full")]
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model="pocket", messages=USER)
    site.core.batches = [[started(), thought("hm")], NotReady("the engine was lost")]
    with pytest.raises(openai.APIError, match="the engine was lost"):
        async for _ in await client.chat.completions.create(model="pocket", messages=USER, stream=True):
            pass
