"""Stop texts and tool calls of an answer, cut at every position, against reading the whole output at once."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text.answer import AnswerRules, ToolTags
from cluster.text.chat_template import ChatTemplate
from cluster.text.phases import PhaseSplitter, ThinkTags
from cluster.text.pieces import Delta, Phase, Piece, ThoughtsClosed, ToolCallArguments, ToolCallStarted
from cluster.text.stops import StopMatcher
from cluster.text.tokenizer import Tokenizer
from tests.text.conftest import QwenVocabulary

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2.50]}}\n</tool_call>'
ARGUMENTS = '{"city": "Zürich", "days": [1, 2.50]}'


@pytest.fixture(scope="session")
def qwen(qwen_vocabulary: QwenVocabulary) -> Tokenizer:
    """A tokenizer over the bytes of the real vocabulary, with the tags that the real models have as tokens."""
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE(_byte_vocabulary(qwen_vocabulary), []))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = tokenizers.decoders.ByteLevel()
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    encoder.add_tokens([tokenizers.AddedToken(tag, special=False, normalized=False) for tag in tags])
    return Tokenizer(encoder, ChatTemplate("", {}))


def _byte_vocabulary(vocabulary: QwenVocabulary) -> dict[str, int]:
    return {vocabulary.token(token_id): token_id for token_id in range(256)}


@pytest.fixture(params=["pocket", "qwen"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@dataclass
class Reading:
    """What a reader has at the end."""

    thoughts: str = ""
    answer: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    stop: str | None = None
    num_tokens: int = 0
    num_notes: int = 0

    def take(self, piece: Piece) -> None:
        self.num_tokens += piece.num_tokens
        match piece:
            case Delta(Phase.THINKING, text):
                self.thoughts += text
            case Delta(Phase.ANSWER, text):
                self.answer += text
            case ToolCallStarted(index, name):
                assert index == len(self.calls)
                self.calls.append((name, ""))
            case ToolCallArguments(index, text):
                name, arguments = self.calls[index]
                self.calls[index] = (name, arguments + text)
            case ThoughtsClosed():
                pass


def read(tokenizer: Tokenizer, chunks: list[list[int]], *, starts_thinking: bool = False, **rules: object) -> Reading:
    think = ThinkTags(tokenizer.token_id("<think>"), tokenizer.token_id("</think>"))
    open_id, close_id = tokenizer.token_id("<tool_call>"), tokenizer.token_id("</tool_call>")
    assert open_id is not None
    assert close_id is not None
    made = AnswerRules(**{"tool_tags": ToolTags(open_id, close_id), **rules})
    splitter = PhaseSplitter(think, tokenizer.detokenizer(), starts_thinking=starts_thinking, rules=made)
    reading = Reading()
    for chunk in chunks:
        for piece in splitter.push(chunk):
            reading.take(piece)
        if splitter.answer.is_over:
            break
    for piece in splitter.finish():
        reading.take(piece)
    reading.stop, reading.num_notes = splitter.answer.stop, len(splitter.answer.notes)
    return reading


def read_everywhere_cut(tokenizer: Tokenizer, text: str, **rules: object) -> Reading:
    """The reading of token after token; every other way to cut the stream must give the same."""
    ids = tokenizer.encode(text)
    reading = read(tokenizer, [[token_id] for token_id in ids], **rules)
    for cut in range(len(ids) + 1):
        assert read(tokenizer, [ids[:cut], ids[cut:]], **rules) == reading
    return reading


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The rule, on the whole text: what is complete first ends it, the longer where two end together."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@given(text=st.text("abc", max_size=12), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(max_examples=400, deadline=None)
def test_a_stop_text_is_found_wherever_the_stream_is_cut(text: str, stops: list[str]) -> None:
    for pieces in [list(text), *[[text[:cut], text[cut:]] for cut in range(len(text) + 1)]]:
        matcher = StopMatcher(stops)
        said = ""
        for piece in pieces:
            if matcher.found is None:
                said += matcher.push(piece)
        assert (said + matcher.flush(), matcher.found) == first_stop(text, stops)


def test_text_is_held_back_only_while_it_may_be_the_start_of_a_stop() -> None:
    matcher = StopMatcher(["END", "\n\n"])
    assert [matcher.push(text) for text in ("aE", "N", "x", "\n", "b")] == ["a", "", "ENx", "", "\nb"]


def test_a_stop_text_ends_the_answer_and_the_tokens_that_count(tokenizer: Tokenizer) -> None:
    reading = read_everywhere_cut(tokenizer, "one, two STOP three", stops=("o ST", "STOP"))
    assert (reading.answer, reading.stop) == ("one, tw", "o ST")
    counted = next(
        count for count in range(40) if "o ST" in tokenizer.decode(tokenizer.encode("one, two STOP three")[:count])
    )
    assert reading.num_tokens == counted


def test_thoughts_do_not_end_at_a_stop_text(tokenizer: Tokenizer) -> None:
    reading = read_everywhere_cut(tokenizer, "a STOP b</think>c STOP d", starts_thinking=True, stops=("STOP",))
    assert (reading.thoughts, reading.answer) == ("a STOP b", "c ")


def test_newlines_before_the_answer_do_not_end_it(tokenizer: Tokenizer) -> None:
    reading = read_everywhere_cut(tokenizer, "a</think>\n\nb\nc", starts_thinking=True, stops=("\n",))
    assert (reading.answer, reading.stop) == ("b", "\n")


def test_a_stop_text_before_min_tokens_does_not_count(tokenizer: Tokenizer) -> None:
    text = "x.y.z"
    num_first = len(tokenizer.encode("x."))
    reading = read_everywhere_cut(tokenizer, text, stops=(".",), min_tokens=num_first)
    assert reading.answer == "x.y"


def test_a_call_is_its_name_and_the_exact_text_of_its_arguments(tokenizer: Tokenizer) -> None:
    reading = read_everywhere_cut(tokenizer, CALL)
    assert reading == Reading(calls=[("weather", ARGUMENTS)], num_tokens=len(tokenizer.encode(CALL)))


def test_calls_and_text_may_stand_in_any_order(tokenizer: Tokenizer) -> None:
    text = f"thought</think>\n\nFirst\n{CALL}\nthen\n{CALL}\n{CALL}"
    reading = read_everywhere_cut(tokenizer, text, starts_thinking=True)
    assert reading.thoughts == "thought"
    assert reading.answer == "First\n\nthen"
    assert reading.calls == [("weather", ARGUMENTS)] * 3


def test_the_name_is_known_before_the_arguments_are_over(pocket: Tokenizer) -> None:
    ids = pocket.encode(CALL[: CALL.index("Zür")])
    splitter = PhaseSplitter(
        ThinkTags(1022, 1023),
        pocket.detokenizer(),
        starts_thinking=False,
        rules=AnswerRules(tool_tags=ToolTags(1012, 1013)),
    )
    pieces = [piece for token_id in ids for piece in splitter.push([token_id])]
    assert isinstance(pieces[0], ToolCallStarted)
    assert "".join(piece.text for piece in pieces[1:] if isinstance(piece, ToolCallArguments)).startswith('{"city"')


@pytest.mark.parametrize(
    "body",
    [
        "no JSON at all",
        '{"name": "f", "arguments": {"a": }}',
        '{"name": "f", "arguments": {"a": 1}}}',
        '{"name": "f", "arguments": {"a": 1}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": "text"}',
        '{"name": "", "arguments": {}}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": {}, "name": "g"}',
        '[{"name": "f", "arguments": {}}]',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "f", "arguments": ' + '{"a":' * 3000 + "1" + "}" * 3000 + "}",
        "",
    ],
    ids=lambda body: body[:30],
)
def test_a_call_that_cannot_be_read_is_text_with_a_note(pocket: Tokenizer, body: str) -> None:
    text = f"see: <tool_call>{body}</tool_call> done"
    ids = pocket.encode(text)
    reading = read(pocket, [[token_id] for token_id in ids])
    assert reading.answer == text
    assert reading.num_notes == 1
    assert reading.num_tokens == len(ids)
    assert not any(_is_whole(arguments) for _, arguments in reading.calls)


def _is_whole(arguments: str) -> bool:
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        return False
    return True


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ('{"arguments": {"a": 1.0}, "name": "f"}', ("f", '{"a": 1.0}')),
        ('{"name": "f"}', ("f", "{}")),
        (' {"name":"f","arguments":{}} ', ("f", "{}")),
        ('{"name": "f", "arguments": {"a": "}\\""}, "id": 7}', ("f", '{"a": "}\\""}')),
        ('{"name": "f\\u00e9", "arguments": {}}', ("fé", "{}")),
    ],
)
def test_other_ways_to_write_a_call_are_read_too(tokenizer: Tokenizer, body: str, call: tuple[str, str]) -> None:
    assert read_everywhere_cut(tokenizer, f"<tool_call>{body}</tool_call>").calls == [call]


def test_a_call_whose_end_is_missing_counts_where_it_is_whole(tokenizer: Tokenizer) -> None:
    whole = CALL.removesuffix("</tool_call>")
    assert read_everywhere_cut(tokenizer, whole + CALL).calls == [("weather", ARGUMENTS)] * 2
    cut = read_everywhere_cut(tokenizer, CALL[:60])
    assert (cut.answer, cut.num_notes) == (CALL[:60].rstrip("\n"), 1)


def test_a_call_in_the_thoughts_triggers_nothing(tokenizer: Tokenizer) -> None:
    reading = read_everywhere_cut(tokenizer, f"I write {CALL} now</think>Done", starts_thinking=True)
    assert (reading.thoughts, reading.answer, reading.calls) == (f"I write {CALL} now", "Done", [])


def test_markup_stays_text_where_calls_are_not_parsed(tokenizer: Tokenizer) -> None:
    assert read_everywhere_cut(tokenizer, CALL, tool_tags=None).answer == CALL


def test_a_tag_spelt_out_letter_by_letter_is_text(pocket: Tokenizer) -> None:
    chunks = [pocket.encode(letter) for letter in CALL]
    reading = read(pocket, chunks)
    assert (reading.answer, reading.calls) == (CALL, [])


def test_the_answer_is_over_after_as_many_calls_as_may_be(tokenizer: Tokenizer) -> None:
    reading = read_everywhere_cut(tokenizer, CALL + CALL + "more", max_tool_calls=1)
    assert reading.calls == [("weather", ARGUMENTS)]
    assert reading.num_tokens == len(tokenizer.encode(CALL))


def test_a_stop_text_in_the_arguments_does_not_end_the_answer(tokenizer: Tokenizer) -> None:
    reading = read_everywhere_cut(tokenizer, CALL + "see Zürich", stops=("Zürich",))
    assert (reading.answer, reading.calls) == ("see ", [("weather", ARGUMENTS)])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data(), arguments=st.dictionaries(st.text(max_size=4), JSON, max_size=3), ascii=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_arguments_come_through_cut_anywhere(
    pocket: Tokenizer, data: st.DataObject, arguments: dict[str, object], ascii: bool
) -> None:
    written = re.sub("<", r"\\u003c", json.dumps(arguments, ensure_ascii=ascii))
    written = written.encode(errors="replace").decode()
    ids = pocket.encode(f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>')
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    chunks = [ids[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert read(pocket, chunks).calls == [("f", written)]


def test_what_follows_a_stop_in_the_same_push_is_ignored_whatever_tags_it_holds(pocket: Tokenizer) -> None:
    tags = ThinkTags(pocket.token_id("<think>"), pocket.token_id("</think>"))
    assert tags.open_id is not None
    ids = [*pocket.encode("7 stop"), tags.open_id, *pocket.encode("8"), tags.open_id]
    splitter = PhaseSplitter(tags, pocket.detokenizer(), starts_thinking=False, rules=AnswerRules(stops=("stop",)))

    texts = [piece.text for piece in (*splitter.push(ids), *splitter.finish()) if isinstance(piece, Delta)]

    assert "".join(texts) == "7 "


def test_an_opening_tag_after_a_call_opens_no_thoughts(qwen: Tokenizer) -> None:
    think_open, think_close, call_open, call_close = (
        qwen.token_id(tag) for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>")
    )
    assert call_open is not None
    assert call_close is not None
    rules = AnswerRules(tool_tags=ToolTags(call_open, call_close))
    tags = ThinkTags(think_open, think_close)
    splitter = PhaseSplitter(tags, qwen.detokenizer(), starts_thinking=False, rules=rules)

    splitter.push(qwen.encode('<tool_call>{"name": "f", "arguments": {}}</tool_call><think>x'))

    assert splitter.answer.num_tool_calls == 1
    assert splitter.phase is Phase.ANSWER
