"""Text ↔ token ids of one checkpoint: encode, decode, chat template, special ids by name.

Hops 2 and 11. Stands on the `tokenizers` library alone: importing `transformers` costs seconds and brings torch.
Knows nothing of requests or phases. Safe to use from several threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from cluster.text.chat_template import ChatTemplate
from cluster.text.detokenizer import Detokenizer
from cluster.text.model_files import REMEDY
from cluster.text.token_bytes import TokenBytes
from workers.errors import CheckpointError


class Tokenizer:
    """The tokenizer of one checkpoint."""

    def __init__(self, encoder: tokenizers.Tokenizer, template: ChatTemplate) -> None:
        self._encoder = encoder
        self._template = template
        special = {id_ for id_, token in encoder.get_added_tokens_decoder().items() if token.special}
        self.token_bytes: Mapping[int, bytes] = TokenBytes(encoder.id_to_token, special)

    @classmethod
    def from_dir(cls, model_dir: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template. Raises CheckpointError."""
        return cls(read_encoder(model_dir / "tokenizer.json"), ChatTemplate.from_dir(model_dir))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; the names of added tokens in it become those tokens."""
        return self._encoder.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of all tokens, special ones left out."""
        detokenizer = self.detokenizer()
        return detokenizer.push(token_ids) + detokenizer.flush()

    def detokenizer(self) -> Detokenizer:
        """A new incremental decoder."""
        return Detokenizer(self.token_bytes)

    def token_text(self, token_id: int) -> str:
        """A token by itself, for people: its text, broken characters replaced; a special one's name."""
        text = self.token_bytes[token_id].decode("utf-8", "replace")
        return text or self._encoder.id_to_token(token_id) or ""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. Raises TemplateError."""
        return self._template.render(messages, tools, variables)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, such as `</think>`."""
        return self._encoder.token_to_id(token)

    def ends_with_open_tag(self, prompt_ids: Sequence[int], tag_id: int) -> bool:
        """Whether the prompt ends with the tag, newlines after it aside: whether what follows is inside of it."""
        for token_id in reversed(prompt_ids):
            if token_id == tag_id:
                return True
            data = self.token_bytes[token_id]
            if not data or data.strip(b"\n"):
                return False
        return False


def read_encoder(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in `file`, a byte-level one. Raises CheckpointError."""
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; {REMEDY}")
    try:
        encoder = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
        raise CheckpointError(f"{file}: is not a tokenizer ({error}); {REMEDY}") from error
    if not isinstance(encoder.decoder, tokenizers.decoders.ByteLevel):
        found = type(encoder.decoder).__name__
        raise CheckpointError(f"{file}: its decoder is {found}, only ByteLevel is served; use a Qwen3 checkpoint")
    encoder.no_truncation()
    encoder.no_padding()
    return encoder
