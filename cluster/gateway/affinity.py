"""What a copy has to do before the first token of a sequence comes: the least is the best place for it.

Hop 3, pure. It is counted in tokens: those of the prompt that its prefix cache lacks, and what the sequences that it
has already stand for. Knows nothing of links, nor whether a guess about a cache is right: a wrong one costs a prefill.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

CHUNK_TOKENS = 64
"""Prefixes are remembered in steps of so many tokens."""
MAX_CHUNKS = 2**15
"""Remembered of each copy: two million tokens."""
TOKENS_PER_RUNNING = 64
"""A sequence that decodes makes a step longer by about as much as so many tokens of a prefill."""
TOKENS_PER_WAITING = 1024
"""One that waits for a slot must first get through its own prefill."""


class CopyLoad(NamedTuple):
    """How busy a copy is."""

    num_running: int = 0
    num_waiting: int = 0


def known_load(said: CopyLoad, num_own: int, num_sent: int) -> CopyLoad:
    """What a copy said last, and what has become of it since, as far as it is our own doing.

    `num_own`: sequences that are there through us. `num_sent`: how many more those are than when it said that; they
    wait where others waited. What others sent there meanwhile nobody here knows.
    """
    num_waiting = max(0, said.num_waiting + num_sent) if said.num_waiting else 0
    num_all = max(num_own, said.num_running + said.num_waiting + num_sent)
    return CopyLoad(num_running=max(0, num_all - num_waiting), num_waiting=num_waiting)


def cost_tokens(num_prompt: int, num_cached: int, load: CopyLoad) -> int:
    """What a copy has to do before the first token of a prompt, of which it has `num_cached` tokens."""
    busy = TOKENS_PER_RUNNING * load.num_running + TOKENS_PER_WAITING * load.num_waiting
    return num_prompt - num_cached + busy


class PrefixMemory:
    """The prefixes that one copy was sent, the least used forgotten first."""

    def __init__(self, max_chunks: int = MAX_CHUNKS) -> None:
        self._max_chunks = max_chunks
        self._chunks: OrderedDict[int, None] = OrderedDict()

    def remember(self, prefix: Sequence[int]) -> None:
        """`prefix`: what `prefix_hashes` makes of a prompt."""
        for chunk in prefix:
            self._chunks[chunk] = None
            self._chunks.move_to_end(chunk)
        while len(self._chunks) > self._max_chunks:
            self._chunks.popitem(last=False)

    def __contains__(self, chunk: object) -> bool:
        return chunk in self._chunks

    def num_cached(self, prefix: Sequence[int]) -> int:
        """Tokens of a prompt that came to this copy before."""
        count = 0
        for chunk in prefix:
            if chunk not in self._chunks:
                break
            count += 1
        return count * CHUNK_TOKENS


def prefix_hashes(prompt_ids: Sequence[int], salt: str) -> tuple[int, ...]:
    """One per whole chunk, of all tokens up to its end. Only prompts with the same salt share any."""
    hashes = []
    last = hash(salt)
    for start in range(0, len(prompt_ids) - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        last = hash((last, *prompt_ids[start : start + CHUNK_TOKENS]))
        hashes.append(last)
    return tuple(hashes)
