"""Has a grammar compiled before it goes to the Router, so that one that cannot be used is the client's to change.

Hop 2. Compiling takes milliseconds and is bounded: it runs in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from cluster.errors import InvalidRequest
from cluster.text.grammar import check_grammar
from mull.v1 import router_pb2
from workers.step import GrammarKind

GrammarCheck = Callable[[router_pb2.Grammar, Path, str], Awaitable[None]]
"""Takes the grammar, the checkpoint's directory and the field that it came from. Raises InvalidRequest."""

_KINDS: dict[router_pb2.Grammar.Kind, GrammarKind] = {
    router_pb2.Grammar.KIND_JSON_SCHEMA: "json_schema",
    router_pb2.Grammar.KIND_JSON_OBJECT: "json_object",
    router_pb2.Grammar.KIND_REGEX: "regex",
    router_pb2.Grammar.KIND_EBNF: "ebnf",
}


async def compiled(grammar: router_pb2.Grammar, model_dir: Path, field: str) -> None:
    """Compile it with the same compiler and bounds as the ranks."""
    try:
        await asyncio.to_thread(check_grammar, _KINDS[grammar.kind], grammar.text, model_dir)
    except InvalidRequest as error:
        words = str(error).removeprefix(f"{error.field}: ")
        raise InvalidRequest(f"{field}: {words}", field=field) from error
