"""What GenerateRequest's fields do: choices, stops, tool calls, budgets, deadlines; and the calls beside Generate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from cluster.gateway.admin import is_loopback
from cluster.gateway.conversations import without_thoughts
from cluster.gateway.requests import prepare
from cluster.gateway.served_model import ServedModel
from mull.v1 import admin_pb2, router_pb2
from mull.v1 import generation_pb2 as pb
from mull.v1.admin_pb2_grpc import AdminServiceStub
from tests.gateway.conftest import RunningGateway, ask, body, kinds, until
from tests.gateway.scripted_router import update

STOP = router_pb2.End.REASON_STOP
LENGTH = router_pb2.End.REASON_LENGTH
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def speaking(gateway: RunningGateway, model: ServedModel, text: str, end: int = STOP) -> Callable[..., None]:
    """A Router whose model says `text`, a token at a time."""
    ids = model.tokenizer.encode(text)

    def answer(submit: router_pb2.Submit) -> None:
        for index, token_id in enumerate(ids):
            last = index == len(ids) - 1
            gateway.router.send(
                update(submit.key, [token_id], admitted=0 if index == 0 else None, end=end if last else None)
            )

    return answer


async def events_of(gateway: RunningGateway, request: pb.GenerateRequest) -> list[pb.GenerateEvent]:
    return [event async for event in gateway.stub.Generate(request)]


def ids_of(events: list[pb.GenerateEvent]) -> list[int]:
    return [token_id for event in events for token_id in getattr(body(event), "token_ids", [])]


def with_tool(**more: object) -> pb.GenerateRequest:
    conversation = pb.Conversation(messages=[pb.Message(role="user", content="hi")], tools=[pb.Tool(name="f")])
    return pb.GenerateRequest(conversation=conversation, **more)


async def test_each_choice_has_its_own_events_and_seed(gateway: RunningGateway, model: ServedModel) -> None:
    texts = {5: "a</think>x<|im_end|>", 6: "b</think>y<|im_end|>", 7: "c</think>z<|im_end|>"}
    gateway.router.on_submit = lambda submit: speaking(gateway, model, texts[submit.sampling.seed])(submit)

    events = await events_of(gateway, ask(n=3, sampling=pb.SamplingOptions(seed=5)))

    for choice, answer in enumerate("xyz"):
        own = [event for event in events if event.choice == choice]
        assert [event.sequence for event in own] == list(range(len(own)))
        assert (own[0].started.seed, kinds(own)[-1]) == (5 + choice, "finished")
        assert "".join(event.answer_delta.text for event in own) == answer


async def test_all_choices_are_cancelled_when_the_client_goes(gateway: RunningGateway) -> None:
    call = gateway.stub.Generate(ask(n=3))
    await gateway.router.submitted(3)
    call.cancel()
    for submit in gateway.router.submits:
        await gateway.router.cancelled(submit.key)


async def test_a_choice_that_fails_ends_them_all(gateway: RunningGateway) -> None:
    def answer(submit: router_pb2.Submit) -> None:
        if len(gateway.router.submits) == 2:
            gateway.router.send(update(submit.key, end=router_pb2.End.REASON_ERROR, message="a rank died"))

    gateway.router.on_submit = answer
    with pytest.raises(grpc.aio.AioRpcError, match="a rank died"):
        await events_of(gateway, ask(n=2))
    await gateway.router.cancelled(gateway.router.submits[0].key)


async def test_a_stop_text_ends_the_sequence_at_the_router(gateway: RunningGateway, model: ServedModel) -> None:
    text = "t</think>one STOP two"
    gateway.router.on_submit = speaking(gateway, model, text + "<|im_end|>")

    events = await events_of(gateway, ask(stop=["STOP"]))

    finished = events[-1].finished
    assert "".join(event.answer_delta.text for event in events) == "one "
    assert (finished.reason, finished.stop) == (pb.Finished.REASON_STOP_TEXT, "STOP")
    sent = ids_of(events)
    assert sent == model.tokenizer.encode(text)[: len(sent)]
    assert model.tokenizer.decode(sent).endswith("STOP")
    assert finished.usage.thinking_tokens + finished.usage.answer_tokens == len(sent)


async def test_a_stop_text_found_before_the_end_cancels(gateway: RunningGateway, model: ServedModel) -> None:
    call = gateway.stub.Generate(ask(stop=["STOP"]))
    submit = await gateway.router.submitted()
    gateway.router.send(update(submit.key, model.tokenizer.encode("</think>a STOP b"), admitted=0))
    assert kinds([event async for event in call])[-1] == "finished"
    await gateway.router.cancelled(submit.key)


async def test_a_clients_stop_token_is_told_by_its_text(gateway: RunningGateway, model: ServedModel) -> None:
    (comma,) = model.tokenizer.encode(",")
    gateway.router.on_submit = speaking(gateway, model, "</think>a,")
    events = await events_of(gateway, ask(stop_token_ids=[comma]))
    assert comma in gateway.router.submits[0].stop_token_ids
    assert (events[-1].finished.reason, events[-1].finished.stop) == (pb.Finished.REASON_STOP_TEXT, ",")
    assert list(events[-1].finished.token_ids) == [comma]


def test_ignore_eos_leaves_only_the_clients_stop_tokens(model: ServedModel) -> None:
    assert prepare(ask(ignore_eos=True, stop_token_ids=[5]), model).stop_token_ids == {5}


async def test_tool_calls_are_events_and_the_reason(gateway: RunningGateway, model: ServedModel) -> None:
    text = f"t</think>Look: {CALL}{CALL}<|im_end|>"
    gateway.router.on_submit = speaking(gateway, model, text)

    events = await events_of(gateway, with_tool())

    starts = [event.tool_call_start for event in events if event.HasField("tool_call_start")]
    assert [(start.index, start.name) for start in starts] == [(0, "f"), (1, "f")]
    assert starts[0].id != starts[1].id
    pieces = [event.tool_call_arguments_delta for event in events]
    assert "".join(piece.arguments_json for piece in pieces if piece.index == 1) == '{"a": 1}'
    assert "".join(event.answer_delta.text for event in events) == "Look: "
    assert events[-1].finished.reason == pb.Finished.REASON_TOOL_CALLS
    assert ids_of(events) == model.tokenizer.encode(text)


async def test_a_malformed_call_is_text_with_a_note(gateway: RunningGateway, model: ServedModel) -> None:
    broken = CALL.replace("1}", "1}}")
    gateway.router.on_submit = speaking(gateway, model, f"</think>{broken}<|im_end|>")
    reply = await gateway.stub.Complete(with_tool())
    (completion,) = reply.completions
    assert (completion.answer, list(completion.tool_calls)) == (broken, [])
    assert completion.finished.reason == pb.Finished.REASON_STOP
    assert "passed on as text" in completion.finished.notes[0]


@pytest.mark.parametrize(
    "more", [{"raw_tool_calls": True}, {"tool_choice": pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)}]
)
async def test_markup_stays_text_where_asked(
    gateway: RunningGateway, model: ServedModel, more: dict[str, bool]
) -> None:
    gateway.router.on_submit = speaking(gateway, model, f"</think>{CALL}<|im_end|>")
    reply = await gateway.stub.Complete(with_tool(**more))
    assert reply.completions[0].answer == CALL


def test_tools_are_not_shown_with_tool_choice_none(model: ServedModel) -> None:
    hidden = with_tool(tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE))
    assert prepare(hidden, model).prompt_ids == prepare(ask("hi"), model).prompt_ids


async def test_one_call_is_enough_where_parallel_calls_are_not_wanted(
    gateway: RunningGateway, model: ServedModel
) -> None:
    gateway.router.on_submit = speaking(gateway, model, f"</think>{CALL}{CALL}<|im_end|>")
    reply = await gateway.stub.Complete(with_tool(parallel_tool_calls=False))
    assert len(reply.completions[0].tool_calls) == 1
    assert reply.completions[0].finished.reason == pb.Finished.REASON_TOOL_CALLS


async def test_thoughts_closed_by_the_budget_say_so(gateway: RunningGateway, model: ServedModel) -> None:
    def answer(submit: router_pb2.Submit) -> None:
        forced = list(submit.close_thinking_ids)
        gateway.router.send(update(submit.key, [40, 41], admitted=0))
        gateway.router.send(update(submit.key, forced, num_forced=len(forced)))
        gateway.router.send(update(submit.key, model.tokenizer.encode("4<|im_end|>"), end=STOP))

    gateway.router.on_submit = answer
    reply = await gateway.stub.Complete(ask(thinking_budget=2))
    submit, (completion,) = gateway.router.submits[0], reply.completions
    assert submit.thinking_budget == 2
    assert model.tokenizer.decode(submit.close_thinking_ids).endswith("</think>\n\n")
    assert completion.thinking_ended == pb.ThinkingEnded.REASON_BUDGET
    assert "time to think is up" in completion.thinking
    assert completion.answer == "4"
    num_closing = list(submit.close_thinking_ids).index(model.tags.close_id) + 1
    assert completion.finished.usage.thinking_tokens == 2 + num_closing


async def test_without_a_budget_the_router_is_told_none(gateway: RunningGateway, model: ServedModel) -> None:
    gateway.router.on_submit = speaking(gateway, model, "a</think>b<|im_end|>")
    reply = await gateway.stub.Complete(ask())
    assert not gateway.router.submits[0].HasField("thinking_budget")
    assert reply.completions[0].thinking_ended == pb.ThinkingEnded.REASON_NATURAL


async def test_an_operator_lowers_the_budget_of_running_requests(gateway: RunningGateway) -> None:
    # given
    calls = [gateway.stub.Generate(ask(request_id=name, thinking_budget=100)) for name in ("a", "b")]
    await gateway.router.submitted(2)
    keys = {submit.request_id: submit.key for submit in gateway.router.submits}
    admin = AdminServiceStub(gateway.channel)
    # when: one, then all, and never up
    for target, budget in (({"request_id": "a"}, 7), ({"all": admin_pb2.AllRequests()}, 50)):
        reply = await admin.SetThinkingBudget(admin_pb2.SetThinkingBudgetRequest(thinking_budget=budget, **target))
        assert reply.num_lowered == 1
    # then
    await gateway.router.budgeted(2)
    assert gateway.router.budgets == [(keys["a"], 7), (keys["b"], 50)]
    for call in calls:
        call.cancel()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (admin_pb2.SetThinkingBudgetRequest(thinking_budget=1), "target"),
        (admin_pb2.SetThinkingBudgetRequest(request_id="x"), "thinking_budget"),
    ],
)
async def test_a_budget_needs_a_number_and_a_target(
    gateway: RunningGateway, request_: admin_pb2.SetThinkingBudgetRequest, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=field) as caught:
        await AdminServiceStub(gateway.channel).SetThinkingBudget(request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("peer", "is_own"),
    [("ipv4:127.0.0.1:5", True), ("ipv6:%5B::1%5D:5", True), ("unix:", True), ("ipv4:10.0.0.1:5", False)],
)
def test_only_this_machine_is_an_operator(peer: str, is_own: bool) -> None:
    assert is_loopback(peer) is is_own


async def test_a_request_past_its_time_is_cancelled(gateway: RunningGateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=r"0\.05") as caught:
        await events_of(gateway, ask(timeout_seconds=0.05))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await gateway.router.cancelled((await gateway.router.submitted()).key)


async def test_the_calls_own_deadline_cancels_too(gateway: RunningGateway) -> None:
    call = gateway.stub.Complete(ask(), timeout=2)
    await gateway.router.submitted()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await gateway.router.cancelled((await gateway.router.submitted()).key)
    await until(lambda: gateway.server.num_streams == 0, "the stream's end")


async def test_the_router_gets_what_was_asked_for(
    gateway: RunningGateway, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []

    async def check(grammar: router_pb2.Grammar, model_dir: Path, field: str) -> None:
        checked.append((grammar.text, model_dir, field))

    monkeypatch.setattr(gateway.server.core, "_check_grammar", check)
    gateway.router.on_submit = speaking(gateway, model, "a", LENGTH)
    options = pb.SamplingOptions(logit_bias={7: -1.5}, bad_words=["bad"], prompt_logprobs=2)
    request = ask(min_tokens=3, priority=-4, sampling=options, response_format=pb.ResponseFormat(regex="a+"))
    await events_of(gateway, request)
    submit = gateway.router.submits[0]
    assert (submit.min_tokens, submit.priority, submit.num_prompt_logprobs) == (3, -4, 2)
    assert dict(submit.sampling.logit_bias) == {7: -1.5}
    words = {model.tokenizer.decode(word.ids) for word in submit.bad_words}
    assert words == {"bad", " bad"}
    expected = router_pb2.Grammar(kind=router_pb2.Grammar.KIND_REGEX, text="a+", after_thinking=True)
    assert submit.grammar == expected
    assert checked == [("a+", model.path, "response_format")]


async def test_a_required_tool_is_a_grammar_of_its_calls(model: ServedModel) -> None:
    required = with_tool(tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED))
    prepared = prepare(required, model)
    assert prepared.grammar is not None
    assert prepared.grammar.after_thinking
    assert prepared.grammar_field == "tool_choice"
    assert '<[1012]> "\\n" (body_0) "\\n" <[1013]>' in prepared.grammar.text
    named = with_tool(tool_choice=pb.ToolChoice(tool_name="f"), parallel_tool_calls=False)
    assert "start: call\n" in prepare(named, model).grammar.text


async def test_prompt_logprobs_are_in_started(gateway: RunningGateway) -> None:
    entry = router_pb2.RouterLogprobs(logprob=-1, top_ids=[66], top_logprobs=[-1])
    message = router_pb2.SequenceUpdate(
        key=1,
        token_ids=[5],
        admitted=router_pb2.Admitted(),
        prompt_logprobs=[entry, entry],
        end=router_pb2.End(reason=LENGTH),
    )
    gateway.router.on_submit = lambda _submit: gateway.router.send(message)
    events = await events_of(gateway, ask(sampling=pb.SamplingOptions(prompt_logprobs=1)))
    assert [item.top[0].token_id for item in events[0].started.prompt_logprobs] == [66, 66]


@pytest.mark.parametrize(
    ("format_", "kind", "text"),
    [
        (pb.ResponseFormat(json_object=pb.JsonObject()), "JSON_OBJECT", ""),
        (pb.ResponseFormat(json_schema='{"type": "object"}'), "JSON_SCHEMA", '{"type": "object"}'),
        (pb.ResponseFormat(grammar="root ::= [a]"), "EBNF", "root ::= [a]"),
        (pb.ResponseFormat(choices=pb.Choices(texts=["a", 'b"\n'])), "EBNF", 'start: "a" | "b\\"\\n"\n'),
    ],
)
def test_a_format_becomes_a_grammar(model: ServedModel, format_: pb.ResponseFormat, kind: str, text: str) -> None:
    grammar = prepare(ask(response_format=format_), model).grammar
    assert grammar is not None
    assert (router_pb2.Grammar.Kind.Name(grammar.kind), grammar.text) == (f"KIND_{kind}", text)


def test_the_scope_says_where_the_format_begins(model: ServedModel) -> None:
    everything = pb.ResponseFormat(regex="a", scope=pb.ResponseFormat.SCOPE_ALL)
    grammar = prepare(ask(response_format=everything), model).grammar
    assert grammar is not None
    assert not grammar.after_thinking


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("<think>\nhm\n</think>\n\n4", "4"),
        ("hm</think>4", "4"),
        ("4", "4"),
        ("<think>cut off", ""),
        ("I say <think>", "I say <think>"),
        ("<think>a</think>b</think>c", "c"),
    ],
)
def test_history_loses_its_thoughts(content: str, answer: str) -> None:
    assert without_thoughts(content) == answer


def test_no_thought_of_an_assistant_reaches_the_prompt(model: ServedModel) -> None:
    turns = [
        pb.Message(role="user", content="q"),
        pb.Message(role="assistant", content="<think>secret</think>said", reasoning_content="hidden"),
        pb.Message(role="tool", content="<think>kept</think>"),
    ]
    prompt = model.tokenizer.decode(
        prepare(pb.GenerateRequest(conversation=pb.Conversation(messages=turns)), model).prompt_ids
    )
    assert "said" in prompt
    assert "kept" in prompt
    assert "secret" not in prompt
    assert "hidden" not in prompt


async def test_complete_has_all_in_one_message(gateway: RunningGateway, model: ServedModel) -> None:
    text = f"t</think>so\n{CALL}<|im_end|>"
    gateway.router.on_submit = speaking(gateway, model, text)
    reply = await gateway.stub.Complete(with_tool(n=2, request_id="mine"))
    assert (reply.request_id, reply.model) == ("mine", "pocket")
    assert [completion.choice for completion in reply.completions] == [0, 1]
    completion = reply.completions[1]
    assert (completion.thinking, completion.answer) == ("t", "so")
    assert json.loads(completion.tool_calls[0].arguments_json) == {"a": 1}
    assert list(completion.token_ids) == model.tokenizer.encode(text)


async def test_text_and_conversations_become_tokens_and_back(gateway: RunningGateway, model: ServedModel) -> None:
    reply = await gateway.stub.Tokenize(pb.TokenizeRequest(text="Straße<|im_end|>"))
    assert list(reply.token_ids) == model.tokenizer.encode("Straße<|im_end|>")
    assert reply.texts[-1] == "<|im_end|>"
    assert reply.max_model_len == 4096
    conversation = ask("hi").conversation
    reply = await gateway.stub.Tokenize(pb.TokenizeRequest(conversation=conversation))
    assert list(reply.token_ids) == prepare(ask("hi"), model).prompt_ids
    text = (await gateway.stub.Detokenize(pb.DetokenizeRequest(token_ids=model.tokenizer.encode("Straße")))).text
    assert text == "Straße"


async def test_a_wrong_token_id_is_named(gateway: RunningGateway) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=r"token_ids\[1\]: 1024") as caught:
        await gateway.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 1024]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_more_variables_reach_the_template(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.text.chat_template import ChatTemplate

    monkeypatch.setattr(model.tokenizer, "_template", ChatTemplate("{{ mood }}", {}))
    prepared = prepare(ask(chat_template_variables_json='{"mood": "calm"}'), model)
    assert model.tokenizer.decode(prepared.prompt_ids) == "calm"


async def test_tokenize_renders_with_the_same_variables(
    gateway: RunningGateway, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.text.chat_template import ChatTemplate

    monkeypatch.setattr(model.tokenizer, "_template", ChatTemplate("{{ mood }}", {}))
    conversation, variables = ask().conversation, '{"mood": "calm"}'
    done = await gateway.stub.Tokenize(
        pb.TokenizeRequest(conversation=conversation, chat_template_variables_json=variables)
    )
    assert model.tokenizer.decode(done.token_ids) == "calm"
    with pytest.raises(grpc.aio.AioRpcError, match="template"):
        await gateway.stub.Tokenize(pb.TokenizeRequest(text="x", chat_template_variables_json=variables))
