"""Clients that people have already, against a live `mull serve`: openai's, and qwen-agent with a tool of its own."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from mull.client import Client, Finished, RetryPolicy, Started
from tests.end_to_end.servers import Server, descendants, serving, wait_until

pytestmark = pytest.mark.timeout(300)

SUM = [{"role": "user", "content": "What is 347 + 285?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Total(pydantic.BaseModel):
    total: Literal[632]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--tp", "1", "--threads-per-rank", "1") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.http_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_thoughts_come_apart_from_the_right_answer(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="pocket", messages=SUM, temperature=0)

    assert "632" in done.choices[0].message.content
    assert done.choices[0].message.reasoning_content
    assert done.choices[0].finish_reason == "stop"
    usage = done.usage
    assert usage.completion_tokens > usage.completion_tokens_details.reasoning_tokens > 0


def test_a_stream_gives_the_same_as_the_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="pocket", messages=SUM, temperature=0.8, seed=5)
    stream = client.chat.completions.create(model="pocket", messages=SUM, temperature=0.8, seed=5, stream=True)

    deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thoughts == whole.choices[0].message.reasoning_content


def test_output_cut_in_the_thoughts_has_empty_content(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="pocket", messages=SUM, max_tokens=5)

    assert (done.choices[0].finish_reason, done.choices[0].message.content) == ("length", "")


def test_many_async_clients_at_once_each_get_their_answer(server: Server) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.http_url}/v1", api_key="none") as client:

            async def ask(n: int) -> str:
                messages = [{"role": "user", "content": f"What is {n} + 285?"}]
                done = await client.chat.completions.create(model="pocket", messages=messages, temperature=0)
                return done.choices[0].message.content

            return await asyncio.gather(*(ask(n) for n in range(300, 308)))

    answers = asyncio.run(ask_all())

    assert sum(str(n + 285) in answer for n, answer in zip(range(300, 308), answers, strict=True)) >= 7


def test_a_response_streams_to_its_text(client: openai.OpenAI) -> None:
    with client.responses.stream(model="pocket", input="What is 347 + 285?", temperature=0) as stream:
        kinds = {event.type for event in stream}
        done = stream.get_final_response()

    assert {"response.reasoning_text.delta", "response.output_text.delta", "response.completed"} <= kinds
    assert "632" in done.output_text


def test_a_text_completion_goes_on(client: openai.OpenAI) -> None:
    done = client.completions.create(model="pocket", prompt="1 2 3", max_tokens=4)

    assert done.usage.completion_tokens == 4


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="pocket"):
        client.chat.completions.create(model="other", messages=SUM)


def test_a_tool_is_called_and_its_result_answered(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked = client.chat.completions.create(model="pocket", messages=messages, tools=[WEATHER], temperature=0)
    (call,) = asked.choices[0].message.tool_calls
    messages += [
        asked.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 31, "condition": "windy"}'},
    ]
    done = client.chat.completions.create(model="pocket", messages=messages, tools=[WEATHER], temperature=0)

    assert asked.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert "31" in done.choices[0].message.content


def test_a_named_tool_is_called_whatever_was_asked(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    done = client.chat.completions.create(
        model="pocket", messages=SUM, tools=[WEATHER], tool_choice=choice, temperature=0, max_tokens=600
    )

    assert [call.function.name for call in done.choices[0].message.tool_calls] == ["get_weather"]


def test_a_budget_ends_the_thoughts_and_the_answer_follows(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="pocket", messages=SUM, temperature=0, extra_body={"thinking_budget": 8}, max_tokens=300
    )
    at_once = client.chat.completions.create(
        model="pocket",
        messages=SUM,
        max_tokens=300,
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )

    assert done.choices[0].message.content
    assert len(done.choices[0].message.reasoning_content) < 200
    assert at_once.choices[0].message.content


def test_choices_and_stops(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="pocket", messages=SUM, n=2, temperature=0, stop=["= 6"])

    assert len(done.choices) == 2
    assert [choice.finish_reason for choice in done.choices] == ["stop", "stop"]
    assert all("= 6" not in choice.message.content for choice in done.choices)


def test_one_of_several_texts_is_answered(client: openai.OpenAI) -> None:
    extra = {"guided_choice": ["yes", "no"]}
    done = client.chat.completions.create(model="pocket", messages=SUM, temperature=0, extra_body=extra)

    assert done.choices[0].message.content in ("yes", "no")


def test_the_parse_helper_gives_an_object_of_the_schema(client: openai.OpenAI) -> None:
    done = client.chat.completions.parse(model="pocket", messages=SUM, response_format=Total, temperature=0)

    assert done.choices[0].message.parsed == Total(total=632)


@pytest.mark.parametrize("parses_itself", [True, False])
def test_a_qwen_agents_answer_uses_the_result_of_its_tool(
    server: Server, parses_itself: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent writes tools into its own prompt and parses their markup; in one of the runs the thoughts too."""
    # Its import takes IPv6 away from the whole process; this gives it back at the end.
    monkeypatch.setattr(socket, "getaddrinfo", socket.getaddrinfo)
    agents = pytest.importorskip("qwen_agent.agents")
    tools = pytest.importorskip("qwen_agent.tools.base")
    calls = []

    class GetWeather(tools.BaseTool):
        name = "get_weather"
        description = "Get the current weather in a city."
        parameters = WEATHER["function"]["parameters"]

        def call(self, params: str, **_: object) -> str:
            calls.append(json.loads(params))
            return json.dumps({"temperature": 31, "condition": "windy"})

    extra = {"separate_reasoning": False} if parses_itself else {}
    agent = agents.FnCallAgent(
        llm={
            "model": "pocket",
            "model_type": "oai",
            "model_server": f"{server.http_url}/v1",
            "api_key": "none",
            "generate_cfg": {
                "temperature": 0.0,
                "max_retries": 0,
                "extra_body": extra,
                "thought_in_content": parses_itself,
                "fncall_prompt_type": "nous",
            },
        },
        function_list=[GetWeather()],
    )
    *_, last = agent.run([{"role": "user", "content": "What is the weather in Paris?"}])

    assert calls == [{"city": "Paris"}]
    assert "31" in last[-1]["content"]
    assert "windy" in last[-1]["content"]


def test_ctrl_c_lets_a_running_stream_end_and_leaves_no_process(server: Server) -> None:
    """The last test of this server."""
    started = descendants(server.process)
    with Client(server.address, retry=RetryPolicy(resumptions=0)) as client:
        reply = iter(client.chat("What is 347 + 285?", temperature=0))
        assert isinstance(next(reply), Started)
        server.interrupt()
        *_, last = reply

    assert isinstance(last, Finished)
    assert server.wait() == 0
    wait_until(lambda: not any(p.is_running() for p in started), "all processes of the server to end")
