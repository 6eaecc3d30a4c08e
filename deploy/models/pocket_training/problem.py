"""What a training or test problem is, and the split that keeps test problems out of training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

SPELLED = "\x01"
HELD_OUT_PERCENT = 8

Message = dict[str, Any]


def spelled(word: str) -> str:
    """Mark `word` so that the encoder writes it letter by letter."""
    return f"{SPELLED}{word}{SPELLED}"


def plain(text: str) -> str:
    """Return `text` as a reader sees it, without the marks of `spelled`."""
    return text.replace(SPELLED, "")


def is_held_out(key: str) -> bool:
    """Whether what `key` names is for tests only: a fixed function of the key."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One conversation up to the model's turn, and the turn that is wanted.

    `keys` name the content without its phrasing ("add 347+285", "get_time(Oslo)"). Problems are split by them, so a
    test problem is unseen in every phrasing, and a held-out tool call is unseen in every prompt style and every role.
    `thinking` and `answer` may carry `spelled` marks.
    """

    skill: str
    keys: tuple[str, ...]
    messages: list[Message]
    thinking: str
    answer: str
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_held_out(self) -> bool:
        """Whether any part of this problem is for tests only."""
        return any(map(is_held_out, self.keys))

    @property
    def expected(self) -> str:
        """The answer as a reader sees it."""
        return plain(self.answer)


def question(text: str) -> list[Message]:
    """A conversation that is one user turn."""
    return [{"role": "user", "content": text}]
