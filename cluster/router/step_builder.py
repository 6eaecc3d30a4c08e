"""A plan while it is being made, and what the Router must remember of it until its result is back.

Hop 5, a part of the scheduler. Holds sequences beside slots: by the time a result comes, a slot may be someone else's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec.structs import replace

from cluster.router.sequence import Sequence
from workers.step import Draft, ExtendSlot, OpenSlot, Prefill, Score, StepPlan


class StepInFlight(NamedTuple):
    """A plan that was sent and has no result yet."""

    step: int
    sampled: list[Sequence]
    """Who gets the tokens of `StepResult.token_ids`, in its order."""
    admitted: list[tuple[Sequence, int]]
    """Sequences that got a slot for the first time, and their cached prompt tokens."""
    scored: list[tuple[int, Sequence, int]]
    """Index of a prefill that scores its prompt, whose it is, and where it starts."""
    computed: list[Sequence]
    """Everyone of whom it computes a token."""
    drafted: list[Sequence]
    """Whose next tokens it guesses at, in the order of `StepResult.accepted_ids`."""


@dataclass(slots=True)
class StepBuilder:
    """Collects the deltas of one step within its token budget."""

    budget: int
    """Tokens that may still be added."""
    prompt_budget: int
    """Of those, tokens of prefills."""
    closed: list[int] = field(default_factory=list)
    """Slots that are opened again for the same sequence."""
    fetched: list[tuple[int, int]] = field(default_factory=list)
    """(host block, block)."""
    opened: list[OpenSlot] = field(default_factory=list)
    extended: list[ExtendSlot] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    prefilled: list[Sequence] = field(default_factory=list)
    """One per prefill, in its order."""
    decodes: list[int] = field(default_factory=list)
    decoded: list[Sequence] = field(default_factory=list)
    """One per decode, in its order."""
    admitted: list[tuple[Sequence, int]] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    drafted: list[Sequence] = field(default_factory=list)
    """One per guess, in its order."""

    @property
    def is_empty(self) -> bool:
        """Nothing to compute."""
        return not self.prefills and not self.decodes

    @property
    def can_prefill(self) -> bool:
        """There is room for another chunk."""
        return self.budget > 0 and self.prompt_budget > 0

    def open(self, seq: Sequence) -> None:
        """Give a sequence its slot on the ranks."""
        assert seq.slot is not None
        seq.is_open = True
        request = seq.request
        # Lists that grow are copied: the plan may be read later than they do.
        opened = OpenSlot(seq.slot, seq.block_ids.copy(), seq.num_computed, request.sampling)
        rules = request.rules
        if request.sampling.has_penalties:
            opened = replace(opened, prompt_ids=request.prompt_ids)
        if request.sampling.has_penalties or (rules is not None and rules.needs_output):
            opened = replace(opened, output_ids=seq.output_ids.copy())
        if rules is not None:
            opened = replace(opened, rules=rules)
        self.opened.append(opened)

    def reopen(self, seq: Sequence, block_ids: list[int]) -> None:
        """Tell the ranks of tokens that were forced; what is computed before those stays."""
        assert seq.slot is not None
        if seq.is_open:
            self.closed.append(seq.slot)
        seq.block_ids += block_ids
        seq.must_reopen = False
        self.open(seq)

    def extend(self, seq: Sequence, block_ids: list[int]) -> None:
        """Append blocks to a running sequence's table."""
        assert seq.slot is not None
        self.extended.append(ExtendSlot(seq.slot, block_ids))
        seq.block_ids += block_ids

    def decode(self, seq: Sequence) -> None:
        """Compute the token that the slot sampled last, and sample the next one."""
        assert seq.slot is not None
        self.decodes.append(seq.slot)
        self.decoded.append(seq)
        self.budget -= 1
        seq.num_computed += 1
        seq.num_pending += 1

    def draft(self, seq: Sequence, token_ids: list[int]) -> None:
        """Compute these behind its decode, too, as far as they are what it samples."""
        assert seq.slot is not None
        self.drafts.append(Draft(seq.slot, token_ids))
        self.drafted.append(seq)
        self.budget -= len(token_ids)

    def prefill(self, seq: Sequence) -> None:
        """Compute as many known tokens as both budgets allow; the chunk with the last of them samples."""
        assert seq.slot is not None
        if not seq.is_open:
            self.open(seq)
        start, room = seq.num_computed, min(self.budget, self.prompt_budget)
        end = min(seq.prefill_end, start + room)
        samples = end == seq.prefill_end
        self.prefills.append(Prefill(seq.slot, start, seq.token_ids(start, end), samples, _score(seq, start, end)))
        self.prefilled.append(seq)
        self.budget -= end - start
        self.prompt_budget -= end - start
        seq.num_computed = end
        seq.num_pending += samples

    def plan(self, step: int, close: list[int], offload: list[tuple[int, int]]) -> StepPlan:
        """What is sent to the ranks."""
        return StepPlan(
            step,
            offload,
            self.fetched,
            close + self.closed,
            self.opened,
            self.extended,
            self.prefills,
            self.decodes,
            self.drafts,
        )

    def in_flight(self, step: int) -> StepInFlight:
        """What is kept until the result is back."""
        decoded = self.decoded
        if not self.prefills:
            return StepInFlight(step, decoded, self.admitted, [], decoded.copy(), self.drafted)
        sampled, scored = [], []
        for index, (prefill, seq) in enumerate(zip(self.prefills, self.prefilled, strict=True)):
            if prefill.sample:
                sampled.append(seq)
            if prefill.score is not None:
                scored.append((index, seq, prefill.start))
        return StepInFlight(step, sampled + decoded, self.admitted, scored, self.prefilled + decoded, self.drafted)


def _score(seq: Sequence, start: int, end: int) -> Score | None:
    """What a chunk of these positions has to score."""
    num_logprobs = seq.request.num_prompt_logprobs
    if num_logprobs is None or not seq.needs_scores:
        return None
    target_ids = seq.request.prompt_ids[start + 1 : end + 1]
    return Score(target_ids, num_logprobs) if target_ids else None
