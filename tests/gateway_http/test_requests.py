"""What OpenAI's, vLLM's and SGLang's fields become in a GenerateRequest; and which are refused, by which name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.config import EffortBudgets
from cluster.errors import InvalidRequest
from cluster.gateway.http.chat import read_chat
from cluster.gateway.http.completions import read_completions
from cluster.gateway.http.fields import Fields
from cluster.gateway.http.responses import read_response
from mull.v1 import generation_pb2 as pb
from tests.gateway_http.conftest import question

Reader = Callable[[Fields, EffortBudgets], object]
BUDGETS = EffortBudgets()
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2.0}}}


def chat(**fields: Any) -> pb.GenerateRequest:
    return read_chat(Fields(question(**fields)), BUDGETS)


def respond(**fields: Any) -> pb.GenerateRequest:
    return read_response(Fields({"input": "hi", **fields}), BUDGETS)


def complete(**fields: Any) -> pb.GenerateRequest:
    (request,) = read_completions(Fields({"prompt": "1 2 3", **fields}), BUDGETS)
    return request


def test_sampling_fields_keep_their_names() -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "seed": 2**62, "prompt_logprobs": 2,
    }  # fmt: skip
    sampling = chat(**fields, bad_words=["a", "b"], logit_bias={"5": -100, "7": 1.5}).sampling

    assert {name: getattr(sampling, name) for name in fields} == fields
    assert list(sampling.bad_words) == ["a", "b"]
    assert dict(sampling.logit_bias) == {5: -100, 7: 1.5}


def test_limits_and_stops_keep_their_names() -> None:
    request = chat(
        n=3, stop="END", stop_token_ids=[1, 2], min_tokens=4, ignore_eos=True, priority=-2, timeout_seconds=1.5,
        parallel_tool_calls=False, max_tokens=9,
    )  # fmt: skip

    assert (request.n, list(request.stop), list(request.stop_token_ids)) == (3, ["END"], [1, 2])
    assert (request.min_tokens, request.ignore_eos, request.priority) == (4, True, -2)
    assert (request.timeout_seconds, request.parallel_tool_calls, request.max_tokens) == (1.5, False, 9)


def test_fields_that_are_absent_or_null_stay_absent() -> None:
    names = ["temperature", "seed", "n", "stop", "max_tokens", "tools", "response_format", "logit_bias", "reasoning"]
    request = chat(**dict.fromkeys(names))

    assert {field.name for field, _ in request.ListFields()} == {"model", "sampling", "conversation", "raw_tool_calls"}
    assert not request.sampling.ListFields()


def test_unknown_fields_are_ignored() -> None:
    assert chat(service_tier="auto", some_new_thing={"a": [1]}) == chat()


def test_a_top_k_of_minus_one_means_no_limit() -> None:
    assert chat(top_k=-1).sampling.top_k == 0


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=6).max_tokens == 6
    assert respond(max_output_tokens=7).max_tokens == 7


def test_user_and_metadata_become_notes() -> None:
    assert dict(chat(user="ann", metadata={"job": "7"}).metadata) == {"user": "ann", "job": "7"}


def test_messages_of_all_roles_reach_the_conversation() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"b":1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
    ]
    turns = chat(messages=messages).conversation.messages

    assert [turn.role for turn in turns] == ["system", "user", "assistant", "tool"]
    assert [turn.content for turn in turns] == ["Be brief.", "ab", "", "7"]
    assert turns[2].reasoning_content == "hm"
    assert turns[2].tool_calls[0] == pb.ToolCall(id="c1", name="f", arguments_json='{"b":1}')
    assert turns[3].tool_call_id == "c1"


def test_the_keys_of_a_tools_schema_keep_their_order() -> None:
    assert chat(tools=[TOOL]).conversation.tools[0].parameters_json == '{"b":1,"a":2.0}'


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)),
        ("auto", pb.ToolChoice(mode=pb.ToolChoice.MODE_AUTO)),
        ("required", pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED)),
        ({"type": "function", "function": {"name": "f"}}, pb.ToolChoice(tool_name="f")),
    ],
)
def test_tool_choices(choice: object, expected: pb.ToolChoice) -> None:
    assert chat(tools=[TOOL], tool_choice=choice).tool_choice == expected


def test_markup_is_left_alone_where_the_client_sent_no_tools() -> None:
    assert chat().raw_tool_calls
    assert not chat(tools=[TOOL]).raw_tool_calls
    assert chat(tools=[TOOL], separate_reasoning=False).raw_tool_calls


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({"thinking_budget": 40}, 40),
        ({"thinking_token_budget": 0}, 0),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 0),
        ({"enable_thinking": False}, 0),
        ({"reasoning_effort": "low"}, BUDGETS.low),
        ({"reasoning": {"effort": "none"}}, 0),
        ({"reasoning_effort": "high", "thinking_budget": 3}, 3),
    ],
)
def test_thinking_budgets(fields: dict[str, Any], budget: int) -> None:
    assert chat(**fields).thinking_budget == budget
    assert respond(**fields).thinking_budget == budget


def test_a_high_effort_is_no_limit() -> None:
    assert not chat(reasoning_effort="high").HasField("thinking_budget")


def test_variables_for_the_template_are_passed_on() -> None:
    request = chat(chat_template_kwargs={"enable_thinking": True, "style": "brief"})

    assert json.loads(request.chat_template_variables_json) == {"enable_thinking": True, "style": "brief"}
    assert not request.HasField("thinking_budget")


SCHEMA = {"type": "object", "properties": {"z": {}, "a": {}}}


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", pb.JsonObject()),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, "json_schema",
         '{"type":"object","properties":{"z":{},"a":{}}}'),
        ({"guided_json": SCHEMA}, "json_schema", '{"type":"object","properties":{"z":{},"a":{}}}'),
        ({"guided_json": "{}"}, "json_schema", "{}"),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "choices", pb.Choices(texts=["a", "b"])),
        ({"guided_grammar": "root ::= 'a'"}, "grammar", "root ::= 'a'"),
        ({"structured_outputs": {"regex": "b"}}, "regex", "b"),
        ({"structured_outputs": {"json_object": True}}, "json_object", pb.JsonObject()),
    ],
)  # fmt: skip
def test_formats_of_answers(fields: dict[str, Any], kind: str, value: object) -> None:
    response_format = chat(**fields).response_format

    assert response_format.WhichOneof("format") == kind
    assert getattr(response_format, kind) == value


def test_the_scope_of_a_format_can_be_chosen() -> None:
    request = chat(guided_regex="a", structured_outputs_scope="all")

    assert request.response_format.scope == pb.ResponseFormat.SCOPE_ALL


def test_a_format_of_plain_text_is_no_format() -> None:
    assert not chat(response_format={"type": "text"}).HasField("response_format")
    assert not respond(text={"format": {"type": "text"}, "verbosity": "low"}).HasField("response_format")


def test_a_responses_format_lies_in_text() -> None:
    asked = respond(text={"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}})

    assert asked.response_format.json_schema == "{}"


def test_items_of_a_response_become_turns() -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "7"},
    ]
    turns = respond(input=items, instructions="Be brief.").conversation.messages

    assert [turn.role for turn in turns] == ["system", "user", "assistant", "tool"]
    assert (turns[2].reasoning_content, turns[2].content, turns[2].tool_calls[0].name) == ("hm", "so", "f")
    assert (turns[3].tool_call_id, turns[3].content) == ("c1", "7")


def test_flat_tools_of_a_response() -> None:
    asked = respond(
        tools=[{"type": "function", "name": "f", "parameters": {}}], tool_choice={"type": "function", "name": "f"}
    )

    assert asked.conversation.tools[0].name == "f"
    assert asked.tool_choice.tool_name == "f"


def test_prompts_of_completions() -> None:
    assert complete(prompt="a").raw_prompt == complete(prompt=["a"]).raw_prompt == "a"
    assert list(complete(prompt=[1, 2]).token_ids.ids) == list(complete(prompt=[[1, 2]]).token_ids.ids) == [1, 2]
    assert complete(logprobs=3).sampling.logprobs == 3


def test_each_of_several_prompts_is_a_request_with_the_same_options() -> None:
    texts = read_completions(Fields({"prompt": ["a", "b"], "seed": 7}), BUDGETS)
    ids = read_completions(Fields({"prompt": [[1, 2], [3]]}), BUDGETS)

    assert [(request.raw_prompt, request.sampling.seed) for request in texts] == [("a", 7), ("b", 7)]
    assert [list(request.token_ids.ids) for request in ids] == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [(None, "prompt"), (["a", 3], "prompt"), ([[1], ["a"]], "prompt[0]"), (["a"] * 65, "prompt")],
)
def test_a_wrong_prompt_is_refused_by_its_name(prompt: object, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        complete(prompt=prompt)

    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"n": 1.5}, "n"),
        ({"n": -1}, "n"),
        ({"seed": -1}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": 1}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"1": "a"}}, "logit_bias.1"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"thinking_budget": -5}, "thinking_budget"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "schema": 5}}, "response_format.schema"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"echo": True}, "echo"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_refused_by_its_name(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)

    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
# fmt: off
NAMES = st.sampled_from([
    "model", "messages", "tools", "tool_choice", "temperature", "top_k", "seed", "n", "stop", "stop_token_ids",
    "logit_bias", "metadata", "user", "reasoning", "text", "reasoning_effort", "response_format", "guided_json",
    "guided_choice", "structured_outputs", "chat_template_kwargs", "max_tokens", "input", "prompt", "instructions",
    "logprobs", "top_logprobs", "parallel_tool_calls", "priority", "bad_words", "min_tokens",
])
# fmt: on


# The first draw imports and compiles what the rest shares; on a busy machine that looks like a slow strategy.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(NAMES, JSON, max_size=4))
def test_any_body_is_read_or_refused_with_a_field(body: dict[str, Any]) -> None:
    for read in (read_chat, read_completions, read_response):
        assert _is_read(read, body) or _refused_field(read, body)


def _is_read(read: Reader, body: dict[str, Any]) -> bool:
    try:
        read(Fields(body), BUDGETS)
    except InvalidRequest:
        return False
    return True


def _refused_field(read: Reader, body: dict[str, Any]) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read(Fields(body), BUDGETS)
    return caught.value.field
