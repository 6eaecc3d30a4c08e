"""Concatenated deltas are the text of decoding everything at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text.detokenizer import Detokenizer
from cluster.text.token_bytes import TokenBytes
from cluster.text.tokenizer import Tokenizer

HARD_TEXT = "naïve 🙂👩‍👩‍👧 日本語 — \u0000\u200b\r\n\n\t  x̷ 𝔘 \ufeffé ｶﾞ <tool_call>{}</tool_call>"


def pieces(detokenizer: Detokenizer, chunks: list[list[int]]) -> list[str]:
    return [*map(detokenizer.push, chunks), detokenizer.flush()]


def cut(ids: list[int], position: int) -> list[list[int]]:
    return [ids[:position], ids[position:]]


def test_hard_text_comes_back_token_by_token(pocket: Tokenizer) -> None:
    ids = pocket.encode(HARD_TEXT)
    assert "".join(pieces(pocket.detokenizer(), [[i] for i in ids])) == pocket.decode(ids)


@given(text=st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_cut_at_every_position_is_exact(pocket: Tokenizer, pocket_encoder, text: str) -> None:
    ids = pocket.encode(text)
    whole = pocket_encoder.decode(ids, skip_special_tokens=True)
    for position in range(len(ids) + 1):
        assert "".join(pieces(pocket.detokenizer(), cut(ids, position))) == whole


@given(ids=st.lists(st.integers(0, 1100), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_token_ids_decode_as_the_reference_decoder_does(pocket: Tokenizer, pocket_encoder, ids: list[int]) -> None:
    # Ids above 1023 are padding of the model's vocabulary: the tokenizer has no such token.
    whole = pocket_encoder.decode(ids, skip_special_tokens=True)
    assert "".join(pieces(pocket.detokenizer(), [[i] for i in ids])) == whole


def test_a_character_over_three_tokens_comes_with_the_last_of_them(pocket: Tokenizer) -> None:
    ids = pocket.encode("日")
    assert len(ids) == 3
    assert pieces(pocket.detokenizer(), [[i] for i in ids]) == ["", "", "日", ""]


def test_an_unfinished_character_is_flushed_as_a_replacement(pocket: Tokenizer) -> None:
    ids = pocket.encode("日")[:2]
    assert pieces(pocket.detokenizer(), [[i] for i in ids]) == ["", "", "�"]


def test_a_token_with_characters_outside_the_byte_alphabet_is_literal_text() -> None:
    data = TokenBytes({0: "<a b>", 1: "Ġb", 2: "Ċ"}.get, special_ids=frozenset())
    assert [data[0], data[1], data[2]] == [b"<a b>", b" b", b"\n"]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_real_vocabulary_decodes_as_tiktoken_does(qwen_vocabulary, data: st.DataObject) -> None:
    # given: text of any script in the real Qwen vocabulary, or any of its tokens
    text = st.text(max_size=30).map(qwen_vocabulary.encode_ordinary)
    ids = data.draw(text | st.lists(st.integers(0, qwen_vocabulary.n_vocab - 1), max_size=40))
    # when: it is decoded at every cut
    for position in range(len(ids) + 1):
        detokenizer = Detokenizer(TokenBytes(qwen_vocabulary.token, special_ids=frozenset()))
        joined = "".join(pieces(detokenizer, cut(ids, position)))
        # then
        assert joined == qwen_vocabulary.decode(ids)


def test_every_byte_is_decoded_once_however_long_the_stream_is(
    pocket: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    detokenizer, ids, decoded = pocket.detokenizer(), pocket.encode(HARD_TEXT) * 50, bytearray()
    decode = detokenizer._decode
    monkeypatch.setattr(detokenizer, "_decode", lambda data, *final: decoded.extend(data) or decode(data, *final))

    for token_id in ids:
        detokenizer.push([token_id])

    assert decoded.decode() == pocket.decode(ids)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_several_tokens_at_a_time_give_the_same_text(pocket: Tokenizer, size: int) -> None:
    ids = pocket.encode(HARD_TEXT)
    chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
    assert "".join(pieces(pocket.detokenizer(), chunks)) == pocket.decode(ids)
