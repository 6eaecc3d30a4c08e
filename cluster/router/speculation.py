"""When drafts pay: whether a copy's next step guesses tokens, and how likely a guess must be to be worth its row.

Hop 5, speculative decoding. A step with drafts stands behind tokens that are all known, so no other step is under way
beside it: that is what drafts cost, beyond their rows. Pure: asks the groups, decides for all of them together, since
they step together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

MOST_CHANCE = 0.95
"""A draft that must be likelier than this is not looked for: what is certain keeps the step busy."""
LEAST_GAIN = 0.25
"""Tokens that drafts must bring each running sequence in a step, on average, beyond what their rows cost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speculation:
    """How much may be guessed, and what a guess costs."""

    max_tokens: int = 0
    """Of one sequence in one step; 0: no drafts."""
    row_cost: float = 0.6
    """Time of one more row in a step, as a share of the time of a step with one."""

    def least_chance(self, num_running: int) -> float:
        """Of a draft that is worth its row: its cost, in tokens that rows bring for certain where so many run."""
        return self.row_cost / (self.row_cost + (1 - self.row_cost) / max(1, num_running))


class Move(Enum):
    """What a copy's next step is."""

    PLAIN = "plain"
    DRAFT = "draft"
    WAIT = "wait"
    """For results: the step after them has drafts, or they are those of one."""


class Group(Protocol):
    """What it asks of an attention group."""

    @property
    def num_running(self) -> int:
        """Sequences with slots."""

    @property
    def is_computing(self) -> bool:
        """A plan that computes something is under way."""

    @property
    def is_drafting(self) -> bool:
        """One with drafts is."""

    def drafting_gain(self, speculation: Speculation) -> float:
        """Tokens that drafts may be expected to bring in its next step, less what they cost."""


def next_move(speculation: Speculation, groups: Sequence[Group]) -> Move:
    """For all groups of a copy."""
    if not speculation.max_tokens:
        return Move.PLAIN
    pays = _pays(speculation, groups)
    if any(group.is_computing for group in groups) and (pays or any(group.is_drafting for group in groups)):
        return Move.WAIT
    return Move.DRAFT if pays else Move.PLAIN


def _pays(speculation: Speculation, groups: Sequence[Group]) -> bool:
    running = [group for group in groups if group.num_running]
    gain = sum(
        group.drafting_gain(speculation)
        for group in running
        if speculation.least_chance(group.num_running) <= MOST_CHANCE
    )
    return gain > 0 and gain >= LEAST_GAIN * sum(group.num_running for group in running)
