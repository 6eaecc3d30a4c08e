"""Checks a grammar before it reaches the ranks, with the compiler and the bounds that they have themselves.

Hop 2. A pure function of its arguments; what it has compiled is kept, so that a grammar that many requests share costs
its compilation once. Safe to use from several threads.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path

from cluster.errors import InvalidRequest
from cluster.text.model_files import read_json
from workers.errors import GrammarError
from workers.grammar import Grammars
from workers.step import GrammarKind

FIELD = "response_format"

_compiling = threading.Lock()
"""A compiler and its cache are for one thread at a time."""


def check_grammar(kind: GrammarKind, text: str, tokenizer_dir: Path) -> None:
    """Compile a grammar; ordinary ones take a few milliseconds, and none more than about a second.

    Raises InvalidRequest with the compiler's words. The first one of a checkpoint reads its tokenizer, which takes up
    to a second, too.
    """
    try:
        with _compiling:
            _grammars(tokenizer_dir).matcher(kind, text)
    except GrammarError as error:
        raise InvalidRequest(f"{FIELD}: {error}", field=FIELD) from error


@lru_cache(maxsize=1)
def _grammars(tokenizer_dir: Path) -> Grammars:
    return Grammars(tokenizer_dir / "tokenizer.json", int(read_json(tokenizer_dir / "config.json")["vocab_size"]))
