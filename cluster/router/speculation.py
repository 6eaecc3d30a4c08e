"""When drafts pay: whether a copy's next step guesses tokens, and how likely a guess must be to be worth its row.

Hop 5, speculative decoding. A step with drafts stands behind tokens that are all known, so no other step is under way
beside it: that is what drafts cost, beyond their rows. Decided for all groups of a copy together, since they step
together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from cluster.router.in_flight import StepsInFlight
from cluster.router.sequence import Sequence
from cluster.router.step_builder import StepBuilder

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
    def running(self) -> Iterable[Sequence]:
        """Sequences with slots."""

    @property
    def num_running(self) -> int: ...

    @property
    def in_flight(self) -> StepsInFlight:
        """Its plans whose results are not back."""


def next_move(speculation: Speculation, groups: Collection[Group]) -> Move:
    """For all groups of a copy."""
    if not speculation.max_tokens:
        return Move.PLAIN
    pays = _pays(speculation, groups)
    is_computing = any(group.in_flight.are_computing for group in groups)
    if is_computing and (pays or any(group.in_flight.are_drafting for group in groups)):
        return Move.WAIT
    return Move.DRAFT if pays else Move.PLAIN


def add_drafts(step: StepBuilder, speculation: Speculation, num_running: int, block_size: int) -> int:
    """What those who decode may say next, as far as their blocks and the rest of the budget have room for it.

    Returns how many tokens that are.
    """
    least_chance = speculation.least_chance(num_running)
    num_tokens = 0
    for seq in step.decoded:
        room = len(seq.block_ids) * block_size - seq.num_computed
        token_ids = seq.draft(min(speculation.max_tokens, room, step.budget), least_chance)
        if token_ids:
            num_tokens += len(token_ids)
            step.draft(seq, token_ids)
    return num_tokens


def _pays(speculation: Speculation, groups: Collection[Group]) -> bool:
    running = [group for group in groups if group.num_running]
    gain = sum(
        _gain(speculation, group) for group in running if speculation.least_chance(group.num_running) <= MOST_CHANCE
    )
    return gain > 0 and gain >= LEAST_GAIN * sum(group.num_running for group in running)


def _gain(speculation: Speculation, group: Group) -> float:
    """Tokens that drafts may be expected to bring in the group's next step, less what they cost."""
    least_chance = speculation.least_chance(group.num_running)
    return sum(
        seq.expected_gain(speculation.max_tokens, least_chance)
        for seq in group.running
        if not seq.is_prefilling and not seq.must_reopen
    )
