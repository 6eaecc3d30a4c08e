"""One request as the Router sees it: its tokens, how far they are computed, and where it stands.

Hop 5: the scheduler moves sequences through their lives. Integers and lists only. Knows no ranks, clients, clocks.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from workers.step import Grammar, SamplingParams, TokenLogprobs, TokenRules


class Phase(Enum):
    """Where in its output a sequence is. A token id moves it, never a text."""

    THINKING = "thinking"
    ANSWER = "answer"


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRequest:
    """What a gateway asks for, validated and complete."""

    key: Hashable
    """Unique among the unfinished requests of one scheduler."""
    prompt_ids: list[int]
    """Taken over, not copied: the caller must not change it any more."""
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    starts_thinking: bool = False
    think_end_id: int | None = None
    min_tokens: int = 0
    """Stop tokens do not end the sequence before so many output tokens."""
    priority: int = 0
    """Higher goes first among those that wait."""
    logit_bias: list[tuple[int, float]] = field(default_factory=list)
    """(token id, what is added to its raw logit)."""
    bad_words: list[list[int]] = field(default_factory=list)
    """Sequences of token ids that must not come."""
    grammar: Grammar | None = None
    cache_salt: str = ""
    """Only requests with the same salt share cached blocks."""
    request_id: str = ""
    """For log lines only."""

    @property
    def rules(self) -> TokenRules | None:
        """What the ranks must know of which tokens may come; None for most requests, which take any."""
        if not (self.logit_bias or self.bad_words or self.min_tokens or self.grammar):
            return None
        return TokenRules(
            logit_bias=self.logit_bias,
            bad_words=self.bad_words,
            stop_ids=sorted(self.stop_token_ids) if self.min_tokens or self.grammar else [],
            first_stop_position=len(self.prompt_ids) + self.min_tokens if self.min_tokens else 0,
            grammar=self.grammar,
        )


class SequenceUpdate(msgspec.Struct, frozen=True):
    """What one step has for one sequence."""

    key: Hashable
    admitted_cached_tokens: int | None = None
    """Present once, when the request got its first slot: prompt tokens that were found in the prefix cache."""
    token_ids: list[int] = []
    """New tokens in order; a stop token is included as the last one."""
    logprobs: list[TokenLogprobs] = []
    """One per token id where the request asked for logprobs; else empty."""
    finish: FinishReason | None = None
    """Present in the last update of a request."""


@dataclass(eq=False, slots=True)
class Sequence:
    """A request and its state. The scheduler is its only writer.

    Token positions:  [0, num_published blocks) in the prefix cache, maybe shared with others
                      [0, num_computed) in KV, or in a plan that has been sent
                      [0, num_known) values known here: prompt, then output
                      [num_known, num_known + num_pending) being sampled by plans in flight: the ranks know them first
    """

    request: SequenceRequest
    max_output: int
    """`request.max_tokens`, or what the context leaves if that is less."""
    phase: Phase
    arrival: int = 0
    """Its place among all requests of its scheduler."""
    output_ids: list[int] = field(default_factory=list)
    num_pending: int = 0

    slot: int | None = None
    """None while it waits: it then holds no blocks either."""
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    prefill_end: int = 0
    """Tokens that were known when the slot was opened: these are prefilled, later ones decoded."""

    block_hashes: list[bytes] = field(default_factory=list)
    """Chain hashes of its first full blocks; grown when it is admitted, so that each block is hashed once."""
    num_published: int = 0
    """Of `block_ids`, the first ones that are in the prefix cache already (or came from there)."""
    num_blocks_wanted: int = 0
    """Free blocks that its last try for admission needed: with fewer, another try is pointless,"""
    wanted_at_growth: int = 0
    """unless the allocator's `num_cache_growths` has changed from this: it may need fewer blocks then."""
    was_admitted: bool = False
    finish: FinishReason | None = None

    @classmethod
    def start(cls, request: SequenceRequest, *, max_output: int, arrival: int = 0) -> Sequence:
        """A new sequence that waits."""
        return cls(request, max_output, Phase.THINKING if request.starts_thinking else Phase.ANSWER, arrival)

    @property
    def num_known(self) -> int:
        """Tokens whose values the Router has."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def is_prefilling(self) -> bool:
        """Some of the tokens known at the opening of its slot are not in a plan yet."""
        return self.num_computed < self.prefill_end

    @property
    def can_sample_more(self) -> bool:
        """max_output allows one more token beyond those in flight."""
        return len(self.output_ids) + self.num_pending < self.max_output

    def token_ids(self, start: int, end: int) -> list[int]:
        """Known tokens at positions [start, end), across the border of prompt and output."""
        num_prompt = len(self.request.prompt_ids)
        if end <= num_prompt:
            return self.request.prompt_ids[start:end]
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : end - num_prompt]
        return self.request.prompt_ids[start:] + self.output_ids[: end - num_prompt]

    def append(self, token_id: int) -> None:
        """Take a sampled token: it may end the thoughts, or the sequence (`finish` is then set)."""
        self.output_ids.append(token_id)
        if token_id == self.request.think_end_id:
            self.phase = Phase.ANSWER
        if token_id in self.request.stop_token_ids and len(self.output_ids) > self.request.min_tokens:
            self.finish = FinishReason.STOP
        elif len(self.output_ids) >= self.max_output:
            self.finish = FinishReason.LENGTH
