"""Token id → the bytes it adds to the text, for byte-level BPE.

Byte-level vocabularies write every byte as one printable character (space as Ġ, newline as Ċ). The decoder of the
`tokenizers` library turns a token back into bytes character by character, and takes a token whole, as UTF-8, where
one of its characters stands for no byte; added tokens go the same way. Done here once per token id, and kept.
Knows nothing of streams or phases.
"""

from __future__ import annotations

from collections.abc import Callable, Set


def byte_alphabet() -> dict[str, int]:
    """Character → byte: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_ALPHABET = byte_alphabet()


class TokenBytes(dict[int, bytes]):
    """A mapping that fills itself: reading an id the first time looks its token up.

    Special tokens, and ids that the tokenizer has no token for (models pad their vocabulary), add no bytes.
    """

    def __init__(self, token_of: Callable[[int], str | None], special_ids: Set[int]) -> None:
        super().__init__()
        self._token_of = token_of
        self._special_ids = special_ids

    def __missing__(self, token_id: int) -> bytes:
        data = b"" if token_id in self._special_ids else self._look_up(token_id)
        self[token_id] = data
        return data

    def _look_up(self, token_id: int) -> bytes:
        token = self._token_of(token_id)
        if token is None:
            return b""
        try:
            return bytes([_ALPHABET[character] for character in token])
        except KeyError:
            return token.encode()
