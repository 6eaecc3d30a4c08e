"""The pocket checkpoint's tokenizer, and the vocabulary of the real models."""

from __future__ import annotations

import base64
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiktoken
import tokenizers

from cluster.text.token_bytes import byte_alphabet
from cluster.text.tokenizer import Tokenizer

POCKET = Path(__file__).parents[2] / "deploy" / "models" / "pocket"
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def pocket_dir() -> Path:
    return POCKET


@pytest.fixture(scope="session")
def pocket() -> Tokenizer:
    return Tokenizer.from_dir(POCKET)


@pytest.fixture(scope="session")
def pocket_encoder() -> tokenizers.Tokenizer:
    """The library's own tokenizer, as an oracle."""
    return tokenizers.Tokenizer.from_file(str(POCKET / "tokenizer.json"))


class QwenVocabulary(tiktoken.Encoding):
    """The vocabulary that the real models have, with each token's name as their tokenizer.json writes it."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        super().__init__("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._character_of = {byte: character for character, byte in byte_alphabet().items()}

    def token(self, token_id: int) -> str:
        return "".join(self._character_of[byte] for byte in self.decode_single_token_bytes(token_id))


@pytest.fixture(scope="session")
def qwen_vocabulary() -> QwenVocabulary:
    package = find_spec("qwen_agent")
    if package is None or not package.submodule_search_locations:
        pytest.fail("the package qwen-agent is missing: pip install --no-deps qwen-agent")
    lines = (Path(package.submodule_search_locations[0]) / "utils" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    return QwenVocabulary(ranks)
