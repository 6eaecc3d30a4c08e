"""One request as the Router sees it: its tokens, how far they are computed, and where it stands.

Hop 5: the scheduler moves sequences through their lives. Integers and lists only. Knows no ranks, clients, clocks.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from cluster.router.drafter import Drafter
from workers.step import Grammar, SamplingParams, TokenLogprobs, TokenRules

MAX_LOOKED_UP = 2048
"""Tokens before the first guess in which it is looked for: more would hold up a step."""


class Phase(Enum):
    """Where in its output a sequence is. A token id moves it, never a text."""

    THINKING = "thinking"
    ANSWER = "answer"


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    GIVEN_UP = "given up"
    """It brought down the ranks that computed it, again and again."""


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
    thinking_budget: int | None = None
    """Thinking tokens at most, to begin with; None: no limit."""
    close_thinking_ids: list[int] = field(default_factory=list)
    """What is forced when the budget is used up, `think_end_id` among them; empty: the thoughts cannot be closed."""
    min_tokens: int = 0
    """Stop tokens do not end the sequence before so many output tokens."""
    priority: int = 0
    """Higher goes first among those that wait."""
    logit_bias: list[tuple[int, float]] = field(default_factory=list)
    """(token id, what is added to its raw logit)."""
    bad_words: list[list[int]] = field(default_factory=list)
    """Sequences of token ids that must not come."""
    grammar: Grammar | None = None
    num_prompt_logprobs: int | None = None
    """Logprobs of the prompt, and of so many of the likeliest tokens beside each; None: not asked for."""
    cache_salt: str = ""
    """Only requests with the same salt share cached blocks."""
    output_ids: list[int] = field(default_factory=list)
    """Output that it has already, from elsewhere: it goes on behind it, as if it had never been stopped."""
    request_id: str = ""
    """For log lines and spans."""
    trace_parent: str = ""
    """The span that caused it, as W3C Trace Context writes it; empty: nobody traces it."""

    @property
    def may_be_drafted(self) -> bool:
        """Its tokens depend on nothing that ranks would have to take back where a guess at them is wrong."""
        sampling = self.sampling
        return self.rules is None and not sampling.has_penalties and sampling.num_logprobs is None

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


class SequenceUpdate(msgspec.Struct, frozen=True, gc=False):
    """What one step has for one sequence. Part of no cycle, so that the collector need not follow one per token."""

    key: Hashable
    admitted_cached_tokens: int | None = None
    """Present once, when the request got its first slot: prompt tokens that were found in the prefix cache."""
    token_ids: list[int] = []
    """New tokens in order; a stop token is included as the last one."""
    logprobs: Collection[TokenLogprobs] = ()
    """One per token id where the request asked for logprobs; else empty."""
    finish: FinishReason | None = None
    """Present in the last update of a request."""
    num_forced: int = 0
    """All of `token_ids`, or none: forced tokens come in an update of their own."""
    prompt_logprobs: Collection[TokenLogprobs] = ()
    """With `admitted_cached_tokens`, where asked for: one per prompt token but the first."""
    num_preemptions: int = 0
    """How often it has lost its slot so far."""


FORCED = TokenLogprobs(0.0, [])
"""A forced token had no choice: probability one."""


@dataclass(eq=False, slots=True)
class Sequence:
    """A request and its state. The scheduler is its only writer.

    Token positions:  [0, num_published blocks) in the prefix cache, maybe shared with others
                      [0, num_computed) in KV, or in a plan that has been sent; the last of them still in the host's
                          memory, where there are `fetches`
                      [0, num_known) values known here: prompt, then output
                      [num_known, num_known + num_pending) being sampled by plans in flight: the ranks know them first
    Where tokens were forced, the plans in flight sample others in their places: those `num_stale` are thrown away.
    """

    request: SequenceRequest
    max_output: int
    """`request.max_tokens`, or what the context leaves if that is less."""
    phase: Phase
    arrival: int = 0
    """Its place among all requests of its scheduler."""
    output_ids: list[int] = field(default_factory=list)
    num_pending: int = 0
    num_stale: int = 0
    """Tokens that plans in flight will bring, before the pending ones, and that nobody gets."""

    thinking_budget: int | None = None
    num_thinking: int = 0
    """Sampled tokens in its thoughts, the closing tag included."""
    num_undelivered: int = 0
    """Forced tokens at the end of `output_ids`; they go out before the next token that is sampled."""
    unannounced_cached_tokens: int | None = None
    """What its first update is to tell; None before that update is due, and after it."""

    slot: int | None = None
    """None while it waits: it then holds no blocks either."""
    is_open: bool = False
    """The ranks know of its slot."""
    block_ids: list[int] = field(default_factory=list)
    fetches: list[tuple[int, int]] = field(default_factory=list)
    """(host block, block) that must be brought back before it is computed, and are in no plan yet."""
    num_computed: int = 0
    prefill_end: int = 0
    """Tokens that were known when the slot was opened: these are prefilled, later ones decoded."""
    must_reopen: bool = False
    """Tokens were forced since its slot was opened: the ranks must be told of them, and it may need more blocks."""

    block_hashes: list[bytes] = field(default_factory=list)
    """Chain hashes of its first full blocks; grown when it is admitted, so that each block is hashed once."""
    num_published: int = 0
    """Of `block_ids`, the first ones that are in the prefix cache already (or came from there)."""
    num_blocks_wanted: int = 0
    """Free blocks that its last try for admission needed: with fewer, another try is pointless,"""
    wanted_at_growth: int = 0
    """unless the allocator's `num_cache_growths` has changed from this: it may need fewer blocks then."""
    was_admitted: bool = False
    num_preemptions: int = 0
    num_scored: int = 0
    """Prompt tokens behind the first whose logprobs are known."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Those, until they are told."""
    drafter: Drafter | None = None
    """Guesses its next tokens; None: nobody asked yet."""
    num_strikes: int = 0
    """Losses of ranks that it may have caused."""
    num_known_at_loss: int = 0
    """Its `num_known` when the last of those happened."""
    finish: FinishReason | None = None

    @classmethod
    def start(cls, request: SequenceRequest, *, max_output: int, arrival: int = 0) -> Sequence:
        """A new sequence that waits."""
        phase = Phase.THINKING if request.starts_thinking else Phase.ANSWER
        seq = cls(request, max_output, phase, arrival, thinking_budget=request.thinking_budget)
        for token_id in request.output_ids:
            seq.append(token_id)
        if (rest := seq.unfinished_closing) is not None:
            seq.num_thinking = request.thinking_budget or 0
            seq.force(rest)
        elif seq.is_over_budget:
            seq.close_thoughts()
        return seq

    @property
    def has_ended(self) -> bool:
        """With its last update, or without one where it was cancelled: nothing brings it tokens any more."""
        return self.finish is not None

    @property
    def num_known(self) -> int:
        """Tokens whose values the Router has."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def is_prefilling(self) -> bool:
        """Some of the tokens known at the opening of its slot are not in a plan yet."""
        return self.num_computed < self.prefill_end

    @property
    def is_over_budget(self) -> bool:
        """It thinks, and may not any more."""
        budget = self.thinking_budget
        if budget is None or self.phase is not Phase.THINKING or not self.request.close_thinking_ids:
            return False
        return self.num_thinking >= budget

    @property
    def unfinished_closing(self) -> list[int] | None:
        """Of the tokens that close its thoughts at the end of its budget, those that its output still lacks.

        None: it has not begun with them, or has all. Forced tokens are no thoughts that count.
        """
        budget, closing = self.thinking_budget, self.request.close_thinking_ids
        if budget is None or not self.request.starts_thinking or self.request.think_end_id in self.output_ids[:budget]:
            return None
        begun = self.output_ids[budget:]
        if not begun or len(begun) >= len(closing) or begun != closing[: len(begun)]:
            return None
        return closing[len(begun) :]

    @property
    def needs_scores(self) -> bool:
        """Logprobs of its prompt are asked for, and some are not known: no block of it may come from the cache."""
        is_asked = self.request.num_prompt_logprobs is not None
        return is_asked and self.num_scored < len(self.request.prompt_ids) - 1

    @property
    def is_full(self) -> bool:
        """max_output is reached."""
        return len(self.output_ids) >= self.max_output

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

    def draft(self, most: int, least_chance: float) -> list[int]:
        """A guess at what it samples next, of at most so many tokens, each right with at least that chance.

        All that plans in flight sample of it must be known. The last token of its output is not guessed at: with it, or
        before it, the sequence ends.
        """
        most = min(most, self.max_output - len(self.output_ids) - 1)
        if not self.request.may_be_drafted or most < 1:
            return []
        if self.drafter is None:
            self.drafter = Drafter(self.token_ids(max(0, self.num_known - MAX_LOOKED_UP), self.num_known))
        return self.drafter.draft(most, least_chance)

    def expected_gain(self, most: int, least_chance: float) -> float:
        """How many tokens such a guess brings, less what its rows cost in tokens."""
        num_drafted = len(self.draft(most, least_chance))
        if not num_drafted or self.drafter is None:
            return 0.0
        return sum(self.drafter.hit_rate**place - least_chance for place in range(1, num_drafted + 1))

    def lose_ranks(self) -> None:
        """All that was computed is gone, and so are the plans in flight: only what is known here is left."""
        self.slot, self.block_ids, self.fetches = None, [], []
        self.is_open = False
        self.num_computed = self.prefill_end = self.num_published = 0
        self.num_blocks_wanted = self.wanted_at_growth = 0
        self.num_pending = self.num_stale = 0
        self.must_reopen = False

    def append(self, token_id: int) -> None:
        """Take a sampled token: it may end the thoughts, or the sequence (`finish` is then set)."""
        self.output_ids.append(token_id)
        if self.drafter is not None:
            self.drafter.push(token_id)
        self.num_thinking += self.phase is Phase.THINKING
        if token_id == self.request.think_end_id:
            self.phase = Phase.ANSWER
        if token_id in self.request.stop_token_ids and len(self.output_ids) > self.request.min_tokens:
            self.finish = FinishReason.STOP
        elif self.is_full:
            self.finish = FinishReason.LENGTH

    def close_thoughts(self) -> None:
        """Force the closing tokens, as far as max_output allows: known tokens, which are prefilled like a prompt.

        What plans in flight sample in their place is thrown away. They cannot end the sequence: it does so with the
        next token that is sampled, which is one too many where it is full.
        """
        self.force(self.request.close_thinking_ids)

    def force(self, token_ids: list[int]) -> None:
        """Put these tokens, the last of them in the answer, behind those that are known; see `close_thoughts`."""
        num_true = self.num_known
        forced = token_ids[: self.max_output - len(self.output_ids)]
        self.output_ids += forced
        if self.drafter is not None:
            self.drafter.extend(forced)
        self.num_undelivered = len(forced)
        self.num_stale, self.num_pending = self.num_stale + self.num_pending, 0
        self.phase = Phase.ANSWER
        if self.slot is not None:
            self.num_computed = min(self.num_computed, num_true)
            self.prefill_end = self.num_known
            self.must_reopen = True

    def take_forced(self) -> SequenceUpdate | None:
        """What tells of the forced tokens, once; the last one where it is full."""
        if not self.num_undelivered:
            return None
        token_ids = self.output_ids[-self.num_undelivered :]
        self.num_undelivered = 0
        if self.is_full:
            self.finish = FinishReason.LENGTH
        logprobs = [FORCED] * len(token_ids) if self.request.sampling.num_logprobs is not None else []
        return self._update(token_ids, logprobs, num_forced=len(token_ids))

    def take_sampled(self, token_ids: list[int], logprobs: Collection[TokenLogprobs]) -> SequenceUpdate:
        """Take sampled tokens, the first of which was pending, and what tells of them.

        The thoughts are closed where one was the last of them. What comes after that one, or after the end, is dropped.
        """
        num_taken, is_over_budget = 0, False
        for token_id in token_ids:
            self.append(token_id)
            num_taken += 1
            is_over_budget = self.is_over_budget
            if self.finish is not None or is_over_budget:
                break
        if self.slot is not None:
            self.num_computed += num_taken - 1
        update = self._update(token_ids[:num_taken], logprobs)
        if self.finish is None and is_over_budget:
            self.close_thoughts()
        return update

    def take_scores(self, start: int, scores: list[TokenLogprobs]) -> None:
        """Take logprobs of the prompt tokens behind `start`; some may be known from before a preemption."""
        fresh = scores[max(0, self.num_scored - start) :]
        self.prompt_logprobs += tuple(fresh)
        self.num_scored += len(fresh)

    def take_announcement(self) -> SequenceUpdate | None:
        """What tells that it was admitted, where no token told it yet; with a scored prompt, its first token does."""
        if self.unannounced_cached_tokens is None or self.request.num_prompt_logprobs is not None:
            return None
        return self._update([], ())

    def _update(self, token_ids: list[int], logprobs: Collection[TokenLogprobs], num_forced: int = 0) -> SequenceUpdate:
        cached_tokens, self.unannounced_cached_tokens = self.unannounced_cached_tokens, None
        scores, self.prompt_logprobs = self.prompt_logprobs, ()
        return SequenceUpdate(
            self.request.key,
            cached_tokens,
            token_ids,
            logprobs,
            self.finish,
            num_forced,
            scores,
            self.num_preemptions,
        )
