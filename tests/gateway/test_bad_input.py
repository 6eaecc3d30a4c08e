"""Every kind of bad input: INVALID_ARGUMENT, with a message that names the field, and nothing reaches the Router."""

from __future__ import annotations

import json

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from cluster.errors import PromptTooLong, RequestError
from cluster.gateway.requests import DEFAULT_MAX_TOKENS, prepare
from cluster.gateway.served_model import ServedModel
from cluster.gateway.status import REQUEST_ID_KEY
from mull.v1 import generation_pb2 as pb
from tests.gateway.conftest import RunningGateway, ask


def chat(*messages: pb.Message, **more: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(conversation=pb.Conversation(messages=messages, **more))


def sampling(**options: object) -> pb.GenerateRequest:
    return ask(sampling=pb.SamplingOptions(**options))


def user(content: str = "hi", **more: object) -> pb.Message:
    return pb.Message(role="user", content=content, **more)


def tool(**fields: str) -> pb.GenerateRequest:
    return chat(user(), tools=[pb.Tool(**fields)])


def call(**fields: str) -> pb.GenerateRequest:
    return chat(user(), pb.Message(role="assistant", tool_calls=[pb.ToolCall(**fields)]))


def with_tools(*names: str, **more: object) -> pb.GenerateRequest:
    tools = [pb.Tool(name=name) for name in names or ("f",)]
    return pb.GenerateRequest(conversation=pb.Conversation(messages=[user()], tools=tools), **more)


AUTO = pb.ToolChoice(mode=pb.ToolChoice.MODE_AUTO)
REQUIRED = pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED)
BAD_REQUESTS = [
    (pb.GenerateRequest(), "input", "nothing given"),
    (chat(), "conversation.messages", "empty"),
    (pb.GenerateRequest(raw_prompt=""), "raw_prompt", "empty"),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids.ids", "empty"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[3, 1024])), "token_ids.ids[1]", "1024"),
    (chat(pb.Message(role="boss", content="hi")), "conversation.messages[0].role", "boss"),
    (chat(user(), pb.Message(role="", content="hi")), "conversation.messages[1].role", "unknown"),
    (chat(user(reasoning_content="x")), "conversation.messages[0].reasoning_content", "assistant"),
    (chat(user(tool_calls=[pb.ToolCall(name="f")])), "conversation.messages[0].tool_calls", "assistant"),
    (call(name=""), "conversation.messages[1].tool_calls[0].name", "empty"),
    (call(name="f", arguments_json="{"), "conversation.messages[1].tool_calls[0].arguments_json", "JSON"),
    (call(name="f", arguments_json="[" * 50), "conversation.messages[1].tool_calls[0].arguments_json", "JSON"),
    (tool(name=""), "conversation.tools[0].name", "empty"),
    (tool(name="f", parameters_json="[1]"), "conversation.tools[0].parameters_json", "object"),
    (tool(name="f", parameters_json='{"a": NaN}'), "conversation.tools[0].parameters_json", "NaN"),
    (ask(model="gpt"), "model", "pocket"),
    (ask(request_id="x" * 129), "request_id", "128"),
    (ask(request_id="a\nb"), "request_id", "printable"),
    (ask(max_tokens=0), "max_tokens", "0"),
    (ask(max_tokens=-5), "max_tokens", "-5"),
    (ask(max_tokens=100_000), "max_tokens", "4096"),
    (ask(max_tokens=2**62), "max_tokens", "4096"),
    (sampling(temperature=-0.1), "sampling.temperature", "[0, inf)"),
    (sampling(temperature=float("nan")), "sampling.temperature", "nan"),
    (sampling(temperature=float("inf")), "sampling.temperature", "inf"),
    (sampling(top_p=0), "sampling.top_p", "(0, 1]"),
    (sampling(top_p=1.5), "sampling.top_p", "1.5"),
    (sampling(top_k=-1), "sampling.top_k", "-1"),
    (sampling(min_p=1.1), "sampling.min_p", "[0, 1]"),
    (sampling(presence_penalty=2.5), "sampling.presence_penalty", "2.5"),
    (sampling(frequency_penalty=-3), "sampling.frequency_penalty", "-3"),
    (sampling(repetition_penalty=0), "sampling.repetition_penalty", "[0.01, 100]"),
    (sampling(repetition_penalty=1e-45), "sampling.repetition_penalty", "[0.01, 100]"),
    (sampling(repetition_penalty=100.1), "sampling.repetition_penalty", "[0.01, 100]"),
    (sampling(logprobs=21), "sampling.logprobs", "20"),
    (sampling(seed=2**63), "sampling.seed", "outside"),
    (ask(n=0), "n", "1 to 16"),
    (ask(n=17), "n", "17"),
    (ask(n=2, sampling=pb.SamplingOptions(seed=2**63 - 1)), "sampling.seed", "+ 1"),
    (ask(stop=["x"] * 17), "stop", "16"),
    (ask(stop=["x", ""]), "stop[1]", "empty"),
    (ask(stop_token_ids=[1] * 65), "stop_token_ids", "64"),
    (ask(stop_token_ids=[5, 1024]), "stop_token_ids[1]", "1024"),
    (ask(max_tokens=5, min_tokens=6), "min_tokens", "5"),
    (ask(max_tokens=5, thinking_budget=6), "thinking_budget", "max_tokens 5"),
    (ask(timeout_seconds=0), "timeout_seconds", "above 0"),
    (ask(timeout_seconds=float("nan")), "timeout_seconds", "nan"),
    (ask(metadata={str(i): "" for i in range(17)}), "metadata", "16"),
    (ask(metadata={"k" * 65: ""}), "metadata", "64"),
    (ask(metadata={"k": "v" * 513}), "metadata", "512"),
    (sampling(logit_bias={1024: 1}), "sampling.logit_bias[1024]", "1024"),
    (sampling(logit_bias={7: 101}), "sampling.logit_bias[7]", "[-100, 100]"),
    (sampling(logit_bias={7: float("nan")}), "sampling.logit_bias[7]", "nan"),
    (sampling(logit_bias=dict.fromkeys(range(1025), 1)), "sampling.logit_bias", "1024"),
    (sampling(bad_words=["x"] * 65), "sampling.bad_words", "64"),
    (sampling(bad_words=[" "]), "sampling.bad_words[0]", "blank"),
    (sampling(prompt_logprobs=21), "sampling.prompt_logprobs", "20"),
    (ask(tool_choice=AUTO), "tool_choice", "no tools"),
    (ask(parallel_tool_calls=True), "parallel_tool_calls", "no tools"),
    (with_tools(tool_choice=pb.ToolChoice()), "tool_choice", "empty"),
    (with_tools(tool_choice=pb.ToolChoice(mode=99)), "tool_choice.mode", "99"),
    (with_tools(tool_choice=pb.ToolChoice(mode=0)), "tool_choice.mode", "0"),
    (with_tools(tool_choice=pb.ToolChoice(tool_name="g")), "tool_choice.tool_name", "f"),
    (with_tools("f", "f"), "conversation.tools[1].name", "twice"),
    (with_tools(parallel_tool_calls=False, raw_tool_calls=True), "parallel_tool_calls", "raw_tool_calls"),
    (
        with_tools(tool_choice=REQUIRED, response_format=pb.ResponseFormat(regex="a")),
        "response_format",
        "tool_choice",
    ),
    (ask(response_format=pb.ResponseFormat()), "response_format", "no format"),
    (ask(response_format=pb.ResponseFormat(regex="a", scope=9)), "response_format.scope", "9"),
    (ask(response_format=pb.ResponseFormat(regex="")), "response_format.regex", "empty"),
    (ask(response_format=pb.ResponseFormat(json_schema="{")), "response_format.json_schema", "JSON"),
    (ask(response_format=pb.ResponseFormat(json_schema="[]")), "response_format.json_schema", "list"),
    (ask(response_format=pb.ResponseFormat(choices=pb.Choices())), "response_format.choices.texts", "0 texts"),
    (
        ask(response_format=pb.ResponseFormat(choices=pb.Choices(texts=[""]))),
        "response_format.choices.texts[0]",
        "empty",
    ),
    (chat(*[pb.Message(role="user", content="x")] * 4097), "conversation.messages", "4096"),
    (with_tools(*(f"f{i}" for i in range(257))), "conversation.tools", "256"),
    (tool(name="f" * 257), "conversation.tools[0].name", "256"),
    (
        tool(name="f", parameters_json='{"a":' * 65 + "1" + "}" * 65),
        "conversation.tools[0].parameters_json",
        "65 levels",
    ),
    (tool(name="f", parameters_json=json.dumps({"a": "x" * 70_000})), "conversation.tools[0].parameters_json", "65536"),
    (
        chat(pb.Message(role="assistant", tool_calls=[pb.ToolCall(name="f")] * 257)),
        "conversation.messages[0].tool_calls",
        "256",
    ),
    (
        chat(pb.Message(role="assistant", tool_calls=[pb.ToolCall(name="f", arguments_json='{"a":' + "[" * 100)])),
        "conversation.messages[0].tool_calls[0].arguments_json",
        "64",
    ),
    (ask(response_format=pb.ResponseFormat(json_schema="[" * 1000)), "response_format.json_schema", "64"),
    (ask(response_format=pb.ResponseFormat(json_schema="é" * 40_000)), "response_format.json_schema", "65536"),
    (ask(stop=["x" * 1025]), "stop[0]", "1024"),
    (sampling(bad_words=["a", "x" * 1025]), "sampling.bad_words[1]", "1024"),
    (ask(metadata={"a": "x" * 513}), "metadata", "512"),
    (ask(chat_template_variables_json='{"a":' * 70), "chat_template_variables_json", "64"),
    (ask(chat_template_variables_json="["), "chat_template_variables_json", "JSON"),
    (ask(chat_template_variables_json='{"tools": 1}'), "chat_template_variables_json", "tools"),
    (pb.GenerateRequest(raw_prompt="x", chat_template_variables_json="{}"), "chat_template_variables_json", "template"),
]


@pytest.mark.parametrize(("request_", "field", "words"), BAD_REQUESTS, ids=lambda value: str(value)[:40])
def test_a_bad_request_is_refused_by_field(
    model: ServedModel, request_: pb.GenerateRequest, field: str, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        prepare(request_, model)
    assert caught.value.field == field
    assert words in str(caught.value)
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("request_", [chat(), ask(model="gpt"), sampling(top_p=1.5), ask("x " * 20_000)])
async def test_the_client_gets_invalid_argument_and_the_field(
    gateway: RunningGateway, request_: pb.GenerateRequest
) -> None:
    # when
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stub.Generate(request_).read()
    # then: the code, and for programs the standard BadRequest detail
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    metadata = dict(caught.value.trailing_metadata())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    detail = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(detail)
    assert detail.field_violations[0].field in str(caught.value.details())
    assert metadata[REQUEST_ID_KEY]
    assert gateway.router.submits == []


@pytest.mark.parametrize("text", ["x" * 2**20, "é" * 2**20])
async def test_an_error_that_quotes_a_long_text_still_reaches_the_client(gateway: RunningGateway, text: str) -> None:
    for request in (ask(model=text), chat(pb.Message(role=text))):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await gateway.stub.Generate(request).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "grpc-status-details-bin" in dict(caught.value.trailing_metadata())


def test_a_prompt_longer_than_the_context_names_both_numbers(model: ServedModel) -> None:
    with pytest.raises(PromptTooLong, match=r"5000 tokens.* 4096 "):
        prepare(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 5000)), model)


def test_a_prompt_that_fills_the_context_leaves_no_room_for_output(model: ServedModel) -> None:
    with pytest.raises(PromptTooLong, match="4095 or less"):
        prepare(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 4096)), model)
    prepared = prepare(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 4095)), model)
    assert prepared.max_tokens == 1


def test_the_templates_own_words_reach_the_client(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.text.chat_template import ChatTemplate

    template = ChatTemplate("{{ raise_exception('two system turns') }}", {})
    monkeypatch.setattr(model.tokenizer, "_template", template)
    with pytest.raises(RequestError, match="two system turns") as caught:
        prepare(ask(), model)
    assert caught.value.field == "conversation"


def test_absent_max_tokens_takes_what_the_context_leaves_up_to_a_limit(model: ServedModel) -> None:
    assert prepare(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * 96)), model).max_tokens == 4000
    assert DEFAULT_MAX_TOKENS == 32768


def test_an_absent_seed_and_request_id_are_drawn(model: ServedModel) -> None:
    first, second = prepare(ask(), model), prepare(ask(), model)
    assert first.request_id != second.request_id
    assert len(first.request_id) == 32
    assert first.sampling.seed != second.sampling.seed
    assert 0 <= first.sampling.seed < 2**63


def test_zero_is_a_value_not_an_absence(model: ServedModel) -> None:
    params = prepare(sampling(temperature=0, top_k=0, seed=0, logprobs=0), model).sampling
    assert (params.temperature, params.top_k, params.seed, params.num_logprobs) == (0, 0, 0, 0)


@pytest.mark.parametrize("bound", [0.01, 100])
def test_the_bounds_of_a_range_are_in_it(model: ServedModel, bound: float) -> None:
    assert prepare(sampling(repetition_penalty=bound), model).sampling.repetition_penalty == pytest.approx(bound)


def test_tools_and_calls_keep_the_order_of_their_keys(model: ServedModel) -> None:
    schema = '{"zebra": 1, "apple": {"type": "string"}, "kiwi": 2.0}'
    prompt = model.tokenizer.decode(prepare(tool(name="f", parameters_json=schema), model).prompt_ids)
    assert schema in prompt


@pytest.mark.parametrize(
    ("raw_prompt", "starts_thinking"),
    [
        ("What?", False),
        ("What?<think>", True),
        ("<think>\n\n", True),
        ("<think>\nSo", False),
        ("<think></think>", False),
    ],
)
def test_any_prompt_that_ends_with_an_open_tag_starts_in_its_thoughts(
    model: ServedModel, raw_prompt: str, starts_thinking: bool
) -> None:
    assert prepare(pb.GenerateRequest(raw_prompt=raw_prompt), model).starts_thinking is starts_thinking


async def test_an_unexpected_fault_is_internal_and_tells_nothing_but_the_request_id(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.server.copies, "submit", lambda *_: 1 / 0)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stub.Generate(ask(request_id="mine")).read()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "mine" in str(caught.value.details())
    assert "zero" not in str(caught.value.details())


async def test_a_message_that_is_too_large_is_refused(gateway: RunningGateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await gateway.stub.Generate(ask("x" * (9 * 2**20))).read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_small_message_that_would_unpack_to_a_large_one_is_refused(gateway: RunningGateway) -> None:
    call = gateway.stub.Tokenize(pb.TokenizeRequest(text="x" * (16 * 2**20)), compression=grpc.Compression.Gzip)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
