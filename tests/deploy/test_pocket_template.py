"""Pocket's chat template behaves like that of the published thinking models."""

from __future__ import annotations

from typing import Any

import pytest
from pocket_training.tokenizer import ChatTemplate

Message = dict[str, Any]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION: Message = {"role": "user", "content": "How is the weather in Oslo?"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "I need the weather.",
    "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}],
}
RESULT: Message = {"role": "tool", "content": '{"temperature": 3}'}


@pytest.fixture
def template() -> ChatTemplate:
    return ChatTemplate.own()


def test_generation_prompt_opens_the_thoughts(template: ChatTemplate) -> None:
    prompt = template.render([{"role": "user", "content": "Hi"}])

    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"


def test_thoughts_of_earlier_turns_given_apart_are_dropped(template: ChatTemplate) -> None:
    answered = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}

    prompt = template.render([{"role": "user", "content": "2 + 2"}, answered, {"role": "user", "content": "Thanks"}])

    assert "<|im_start|>assistant\n4<|im_end|>\n" in prompt
    assert "two and two" not in prompt


@pytest.mark.parametrize("opening", ["<think>\n", ""])
def test_thoughts_of_earlier_turns_inside_the_content_are_dropped(template: ChatTemplate, opening: str) -> None:
    answered = {"role": "assistant", "content": f"{opening}two and two\n</think>\n\n4"}

    prompt = template.render([{"role": "user", "content": "2 + 2"}, answered, {"role": "user", "content": "Thanks"}])

    assert "<|im_start|>assistant\n4<|im_end|>\n" in prompt
    assert "two and two" not in prompt


def test_thoughts_after_the_last_question_are_kept(template: ChatTemplate) -> None:
    prompt = template.render([QUESTION, CALL, RESULT], [WEATHER])

    assert "<|im_start|>assistant\n<think>\nI need the weather.\n</think>\n\n<tool_call>\n" in prompt


def test_a_user_turn_of_tool_results_is_not_a_question(template: ChatTemplate) -> None:
    wrapped = {"role": "user", "content": "<tool_response>\n3\n</tool_response>"}

    prompt = template.render([QUESTION, CALL, wrapped])

    assert "I need the weather." in prompt


def test_tools_are_listed_one_json_a_line_in_the_system_turn(template: ChatTemplate) -> None:
    prompt = template.render([{"role": "system", "content": "Be kind."}, QUESTION], [WEATHER, WEATHER])

    system = prompt.split("<|im_end|>")[0]
    listed = system.split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
    assert system.startswith("<|im_start|>system\nBe kind.\n\n")
    assert len(listed) == 2
    assert all(line.startswith('{"type": "function", "function": {"name": "get_weather"') for line in listed)


def test_calls_are_json_in_tags_whether_arguments_are_objects_or_text(template: ChatTemplate) -> None:
    as_text = {**CALL, "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}]}

    prompts = [template.render([QUESTION, call, RESULT], [WEATHER]) for call in (CALL, as_text)]

    assert prompts[0] == prompts[1]
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>' in prompts[0]


def test_several_calls_stand_on_lines_of_their_own(template: ChatTemplate) -> None:
    twice = {**CALL, "tool_calls": CALL["tool_calls"] * 2}

    prompt = template.render([QUESTION, twice], [WEATHER])

    assert "</tool_call>\n<tool_call>\n" in prompt


def test_results_in_a_row_share_one_user_turn(template: ChatTemplate) -> None:
    prompt = template.render([QUESTION, CALL, RESULT, {"role": "tool", "content": "later"}], [WEATHER])

    assert (
        '<|im_start|>user\n<tool_response>\n{"temperature": 3}\n</tool_response>'
        "\n<tool_response>\nlater\n</tool_response><|im_end|>\n"
    ) in prompt


def test_an_unknown_role_is_refused(template: ChatTemplate) -> None:
    with pytest.raises(ValueError, match="unknown role: narrator"):
        template.render([{"role": "narrator", "content": "Once upon a time"}])
