"""Which copy a sequence goes to: the one that has to do the least before its first token comes.

Hop 3, pure. What a copy has to do is counted in tokens: those of the prompt that its prefix cache lacks, and what the
sequences that it has already stand for. Knows nothing of links, nor whether a guess about a cache is right: a wrong
one costs a prefill.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CHUNK_TOKENS = 64
"""Prefixes are remembered in steps of so many tokens."""
MAX_CHUNKS = 2**15
"""Remembered of each copy: two million tokens."""
TOKENS_PER_RUNNING = 64
"""A sequence that decodes makes a step longer by about as much as so many tokens of a prefill."""
TOKENS_PER_WAITING = 1024
"""One that waits for a slot must first get through its own prefill."""


@dataclass(frozen=True, kw_only=True)
class CopyLoad:
    """How busy a copy is."""

    num_running: int = 0
    num_waiting: int = 0


def known_load(said: CopyLoad, num_sent: int) -> CopyLoad:
    """What a copy said last, or what was sent there since: `num_sent` sequences are there by what we know ourselves."""
    if num_sent <= said.num_running:
        return said
    return CopyLoad(num_running=num_sent, num_waiting=said.num_waiting)


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


def cheapest(num_prompt: int, prefix: Sequence[int], copies: Mapping[str, tuple[PrefixMemory, CopyLoad]]) -> str | None:
    """The copy where the prompt costs least, the first one by name among equals; None where there is no copy."""
    costs = {name: cost_tokens(num_prompt, memory.num_cached(prefix), load) for name, (memory, load) in copies.items()}
    return min(sorted(costs), key=costs.__getitem__, default=None)
