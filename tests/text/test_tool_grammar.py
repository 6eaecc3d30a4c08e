"""The grammars that we write, as the library that enforces them reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.text.answer import ToolTags
from cluster.text.tokenizer import Tokenizer
from cluster.text.tool_grammar import ToolSignature, choice_grammar, tool_call_grammar

llguidance = pytest.importorskip("llguidance")

TAGS = ToolTags(1012, 1013)
SCHEMA = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAME = 'wetter "x"'
TOOLS = [ToolSignature(NAME, SCHEMA), ToolSignature("g", None)]
TEXTS = ["yes", 'nö "q"\n\\d', "日本🙂", "\x7f\u2028"]


@pytest.fixture(scope="session")
def library(pocket_dir: Path) -> Any:
    return llguidance.LLTokenizer(str(pocket_dir / "tokenizer.json"), n_vocab=1024)


def matches(library: Any, pocket: Tokenizer, grammar: str, text: str) -> bool:
    """Whether the whole text, and nothing less, is what the grammar wants."""
    matcher = llguidance.LLMatcher(library, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = pocket.encode(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        (call("g", "{}"), True),
        (call(NAME, '{"a": 1}'), True),
        (call(NAME, '{"a": 1}') + "\n" + call("g", "{}"), True),
        (call("g", '{"a": 1}'), False),
        (call(NAME, '{"a": "x"}'), False),
        (call(NAME, "{}"), False),
        (call(NAME, '{"a": 1, "b": 2}'), False),
        (call(NAME, '{"a":\n1}'), False),
        (call("other", "{}"), False),
        ("hello", False),
        ("", False),
    ],
)
def test_only_calls_of_the_tools_match(library: Any, pocket: Tokenizer, text: str, is_right: bool) -> None:
    assert matches(library, pocket, tool_call_grammar(TOOLS, TAGS, max_calls=None), text) is is_right


def test_one_call_may_be_all(library: Any, pocket: Tokenizer) -> None:
    grammar = tool_call_grammar(TOOLS, TAGS, max_calls=1)
    assert matches(library, pocket, grammar, call("g", "{}"))
    assert not matches(library, pocket, grammar, call("g", "{}") + "\n" + call("g", "{}"))


@pytest.mark.parametrize("text", TEXTS)
def test_a_choice_is_its_text_whatever_is_in_it(library: Any, pocket: Tokenizer, text: str) -> None:
    assert matches(library, pocket, choice_grammar(TEXTS), text)
    assert not matches(library, pocket, choice_grammar(TEXTS), text + "x")
