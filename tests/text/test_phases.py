"""Thoughts and answer of a token stream, against splitting the whole output at once, cut at every position."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text.phases import PhaseSplitter, ThinkTags
from cluster.text.pieces import Delta, Phase, ThoughtsClosed
from cluster.text.tokenizer import Tokenizer

ALPHABET = ["\n", "\n\n", "a", " b", ".\n", "é", "日", "<tool_call>", "<|im_start|>"]


@dataclass
class Split:
    """The texts of a stream, and where it ended."""

    thoughts: str
    answer: str
    phase: Phase


def tags_of(tokenizer: Tokenizer) -> ThinkTags:
    return ThinkTags(tokenizer.token_id("<think>"), tokenizer.token_id("</think>"))


def split_stream(tokenizer: Tokenizer, chunks: list[list[int]], starts_thinking: bool) -> Split:
    """Push the chunks; checks on the way that each token is in one piece, in order."""
    splitter = PhaseSplitter(tags_of(tokenizer), tokenizer.detokenizer(), starts_thinking=starts_thinking)
    texts = {Phase.THINKING: "", Phase.ANSWER: ""}
    for chunk in chunks:
        pieces = splitter.push(chunk)
        assert sum(piece.num_tokens for piece in pieces) == len(chunk)
        for piece in pieces:
            if isinstance(piece, ThoughtsClosed):
                continue
            assert isinstance(piece, Delta)
            assert piece.text or piece.num_tokens
            texts[piece.phase] += piece.text
    for piece in splitter.finish():
        assert isinstance(piece, Delta)
        assert piece.num_tokens == 0
        texts[splitter.phase] += piece.text
    return Split(texts[Phase.THINKING], texts[Phase.ANSWER], splitter.phase)


def split_whole(tokenizer: Tokenizer, ids: list[int], starts_thinking: bool) -> Split:
    """The model cards' rule on the finished output: cut at the closing tag, decode both parts, strip newlines."""
    tags = tags_of(tokenizer)
    thinking, rest = starts_thinking, ids
    while tags.open_id in rest:
        first = rest.index(tags.open_id)
        before = rest[:first]
        if tags.close_id in before or tokenizer.decode(before).strip("\n"):
            break
        thinking, rest = True, rest[first + 1 :]
    thoughts: list[int] = []
    phase = Phase.ANSWER
    if thinking and tags.close_id in rest:
        end = rest.index(tags.close_id)
        thoughts, rest = rest[:end], rest[end + 1 :]
    elif thinking:
        thoughts, rest, phase = rest, [], Phase.THINKING
    parts: list[list[int]] = [[]]
    for token_id in rest:
        if token_id == tags.close_id:
            parts.append([])
        else:
            parts[-1].append(token_id)
    answer = "".join(map(tokenizer.decode, parts))
    return Split(tokenizer.decode(thoughts).strip("\n"), answer.strip("\n"), phase)


def token_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    tags = tags_of(tokenizer)
    known = sorted({token_id for text in ALPHABET for token_id in tokenizer.encode(text)})
    return st.lists(st.sampled_from([tags.open_id, tags.close_id, *tokenizer.encode("\n")] * 3 + known), max_size=14)


@given(data=st.data(), starts_thinking=st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_stream_cut_at_every_position_is_split_as_the_whole_is(
    pocket: Tokenizer, data: st.DataObject, starts_thinking: bool
) -> None:
    ids = data.draw(token_lists(pocket))
    expected = split_whole(pocket, ids, starts_thinking)
    for cut in range(len(ids) + 1):
        assert split_stream(pocket, [ids[:cut], ids[cut:]], starts_thinking) == expected
    assert split_stream(pocket, [[token_id] for token_id in ids], starts_thinking) == expected


@pytest.mark.parametrize(
    ("output", "thoughts", "answer", "phase"),
    [
        ("\nSo 4.\n</think>\n\n4\n", "So 4.", "4", Phase.ANSWER),
        ("<think>\nSo 4.\n</think>\n\n4", "So 4.", "4", Phase.ANSWER),
        ("\n<think>\n\nSo\n\n</think>4", "So", "4", Phase.ANSWER),
        ("cut in thou", "cut in thou", "", Phase.THINKING),
        ("</think>4", "", "4", Phase.ANSWER),
        ("a</think>b</think>c", "a", "bc", Phase.ANSWER),
        ("say <think> aloud</think>x", "say <think> aloud", "x", Phase.ANSWER),
        ("a</think><think>b", "a", "<think>b", Phase.ANSWER),
        ("a\n\nb\n</think>\n\nc\n\nd\n\n", "a\n\nb", "c\n\nd", Phase.ANSWER),
        ("\n\n\n", "", "", Phase.THINKING),
        ("a</think><tool_call>{}</tool_call>", "a", "<tool_call>{}</tool_call>", Phase.ANSWER),
    ],
)
def test_the_output_of_a_thinking_model(
    pocket: Tokenizer, output: str, thoughts: str, answer: str, phase: Phase
) -> None:
    chunks = [[token_id] for token_id in pocket.encode(output)]
    assert split_stream(pocket, chunks, starts_thinking=True) == Split(thoughts, answer, phase)


def test_a_tag_spelt_out_letter_by_letter_is_text(pocket: Tokenizer) -> None:
    chunks = [pocket.encode(letter) for letter in "a</think>b"]
    assert split_stream(pocket, chunks, starts_thinking=True).phase is Phase.THINKING


def test_trailing_newlines_are_held_back_until_text_follows(pocket: Tokenizer) -> None:
    splitter = PhaseSplitter(tags_of(pocket), pocket.detokenizer(), starts_thinking=True)
    texts = [piece.text for text in ("a", "\n", "\n", "b") for piece in splitter.push(pocket.encode(text))]
    assert texts == ["a", "", "", "\n\nb"]


def test_a_character_cut_off_by_the_closing_tag_is_a_replacement(pocket: Tokenizer) -> None:
    ids = [*pocket.encode("日")[:2], *pocket.encode("</think>"), *pocket.encode("日")]
    expected = Split("�", "日", Phase.ANSWER)
    assert split_stream(pocket, [[token_id] for token_id in ids], starts_thinking=True) == expected


def test_a_raw_prompt_without_an_open_tag_starts_in_the_answer(pocket: Tokenizer) -> None:
    assert split_stream(pocket, [pocket.encode("4\n")], starts_thinking=False) == Split("", "4", Phase.ANSWER)


def test_a_tokenizer_without_tags_has_only_an_answer(pocket: Tokenizer) -> None:
    splitter = PhaseSplitter(ThinkTags(None, None), pocket.detokenizer(), starts_thinking=False)
    assert splitter.push(pocket.encode("</think>"))[0] == Delta(Phase.ANSWER, "</think>", 1)
