"""Token ids → text, piece by piece, exact: the pieces together are the text of decoding everything at once.

Hop 11. A character whose bytes are spread over tokens comes with the token that completes it; bytes that can never
become a character turn into U+FFFD, as in the one-shot decoder. Constant work per token: only the bytes of an
unfinished character (at most three) are kept. Knows nothing of phases.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The decoder of one token stream."""

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._bytes_of = token_bytes.__getitem__
        self._decoder = _utf8_decoder("replace")
        self._decode = self._decoder.decode

    @property
    def is_pending(self) -> bool:
        """Whether a character has begun and is not complete."""
        return bool(self._decoder.getstate()[0])

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain once these tokens have come; may be empty."""
        return self._decode(b"".join(map(self._bytes_of, token_ids)))

    def flush(self) -> str:
        """What an unfinished character leaves at the end: U+FFFD or nothing. The next token starts afresh."""
        return self._decode(b"", True)
