"""What the gateway says to a grammar."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest

from cluster.errors import InvalidRequest
from cluster.flags import builtin_model
from cluster.text.grammar import check_grammar

SLOW = json.dumps(
    {"properties": {f"p{i}": {"type": "string", "pattern": f"^(a|b)*c{{1,{i}}}$"} for i in range(1, 900)}}
)


def test_a_grammar_that_can_be_used_passes() -> None:
    check_grammar("json_schema", '{"type": "array", "items": {"type": "integer"}}', builtin_model())
    check_grammar("regex", "[a-z]+", builtin_model())
    check_grammar("json_object", "", builtin_model())
    check_grammar("ebnf", 'root ::= "a" | "b" root', builtin_model())
    check_grammar("ebnf", 'start: "<tool_call>\\n" %json {"type": "object"} "\\n</tool_call>"', builtin_model())


def test_a_broken_one_is_the_clients_fault_and_names_the_field() -> None:
    with pytest.raises(InvalidRequest, match="unclosed") as caught:
        check_grammar("regex", "([", builtin_model())

    assert caught.value.field == "response_format"


def test_a_directory_without_tokenizer_is_not_the_clients_fault(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"config\.json"):
        check_grammar("regex", "a", tmp_path)


def test_what_a_grammar_costs_is_bounded() -> None:
    start = time.perf_counter()
    with contextlib.suppress(InvalidRequest):
        check_grammar("json_schema", SLOW, builtin_model())
    assert time.perf_counter() - start < 10  # about a tenth of a second; other work may hold this machine up
