"""Grammars: which tokens may come next so that an output matches a JSON schema, a regular expression or a grammar.

A part of hop 9 that knows tokens and their bytes, not logits: llguidance parses. It works step by step and bounds what
a grammar may cost by itself, in units of work rather than time, so that every rank comes to the same end. The gateway
compiles with the same bounds and refuses what does not pass. No torch here.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from workers.errors import GrammarError
from workers.step import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

log = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]

MAX_TEXT_BYTES = 2**16
MAX_CACHED = 64
"""Compiled grammars that are kept, the last used ones."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=200_000,  # about 15 ms
    step_max_items=50_000,  # about 3 ms
    max_grammar_size=100_000,
    max_lexer_states=50_000,  # about 100 MB
    verbose_errors=False,
)
JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[ \n\r\t]{1,64}"}
"""Models that may write white space without end sometimes do."""


class Grammars:
    """Compiles grammars for one tokenizer, which is read when the first one comes."""

    def __init__(self, tokenizer_file: Path, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._file = tokenizer_file
        self._loaded: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    @property
    def tokenizer(self) -> LLTokenizer:
        """Raises GrammarError where the file cannot be used."""
        if self._loaded is None:
            try:
                self._loaded = LLTokenizer(str(self._file), n_vocab=self.vocab_size)
            except Exception as error:  # the library raises plain exceptions for whatever is wrong with the file
                raise GrammarError(f"{self._file} cannot be used for grammars: {error}") from error
        return self._loaded

    def matcher(self, kind: str, text: str) -> LLMatcher:
        """A matcher at the start of its text. Raises GrammarError."""
        found = self._compiled.pop((kind, text), None) or self._compile(kind, text)
        self._compiled[kind, text] = found
        if len(self._compiled) > MAX_CACHED:
            self._compiled.popitem(last=False)
        return found.deep_copy()

    def blank_ids(self) -> set[int]:
        """Tokens of one or two newlines: what models write between thoughts and answer."""
        spelt = (self.tokenizer.tokenize_str(text) for text in ("\n", "\n\n"))
        return {ids[0] for ids in spelt if len(ids) == 1}

    def _compile(self, kind: str, text: str) -> LLMatcher:
        if len(text.encode()) > MAX_TEXT_BYTES:
            raise GrammarError(f"the grammar has {len(text.encode())} bytes, the limit is {MAX_TEXT_BYTES}; shorten it")
        matcher = LLMatcher(self.tokenizer, _definition(kind, text), log_level=0, limits=LIMITS)
        matcher.compute_bitmask()  # the first mask finds what compiling leaves for later
        if matcher.is_error():
            raise GrammarError(" ".join(matcher.get_error().split()) or "the grammar is too complex")
        return matcher


def _definition(kind: str, text: str) -> str:
    """llguidance's own form of a grammar. Raises GrammarError."""
    try:
        match kind:
            case "json_schema":
                return LLMatcher.grammar_from_json_schema(text, defaults=JSON_OPTIONS)
            case "json_object":
                return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=JSON_OPTIONS)
            case "regex":
                return LLMatcher.grammar_from_regex(text)
            case "ebnf":
                return LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # the library and its converter raise plain exceptions
        raise GrammarError(" ".join(str(error).split())) from error
    raise GrammarError(f"unknown kind of grammar {kind!r}")


class GrammarState:
    """Where one slot's output is in its grammar: a function of the output alone."""

    def __init__(self, grammar: Grammar, stop_ids: list[int], grammars: Grammars, output_ids: list[int]) -> None:
        tokenizer = grammars.tokenizer
        self._start_id = grammar.start_id
        self._is_waiting = grammar.start_id is not None
        self._stop_ids = stop_ids or list(tokenizer.eos_tokens)
        self._never_ids = [*tokenizer.eos_tokens, *([] if grammar.start_id is None else [grammar.start_id])]
        self._blank_ids = set() if grammar.start_id is None else grammars.blank_ids()
        """Those that may still come before the first token of the grammar."""
        self._vocab_size = grammars.vocab_size
        self._matcher = _matcher(grammar, grammars)
        for token_id in output_ids:
            self.advance(token_id)

    @property
    def is_complete(self) -> bool:
        """Nothing but the end may follow."""
        return self._matcher.is_stopped()

    def advance(self, token_id: int) -> None:
        """Take note of an output token, sampled or forced. One that does not match leaves only the end."""
        if self._is_waiting:
            self._is_waiting = token_id != self._start_id
        elif token_id in self._stop_ids or self._matcher.is_error():
            return
        elif token_id in self._blank_ids:
            self._blank_ids = set()
        else:
            self._blank_ids = set()
            if not self._matcher.consume_token(token_id):
                log.warning("token %d does not match its grammar: %s", token_id, self._matcher.get_error())

    def allowed(self) -> Mask | None:
        """Which tokens may come next, [V]; None: all of them, before the grammar starts."""
        if self._is_waiting:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        # Read after the mask was computed: a grammar that turns out too complex ends here.
        can_end = self._matcher.is_accepting() or self._matcher.is_error()
        mask[self._never_ids] = False
        mask[self._stop_ids] = can_end
        mask[list(self._blank_ids)] = True
        return mask


def _matcher(grammar: Grammar, grammars: Grammars) -> LLMatcher:
    """Of a grammar that fails here, though it passed at the gateway, only the end may come: others must not suffer."""
    try:
        return grammars.matcher(grammar.kind, grammar.text)
    except GrammarError as error:
        log.error("a grammar came that cannot be used: %s", error)
        return LLMatcher(grammars.tokenizer, "", log_level=0)
