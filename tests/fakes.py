"""Stand-ins that take the real contracts seriously: ranks without a model.

`FakeRanks` executes plans on a paged memory of tokens. A sequence's next token is a pure function of all its tokens,
read back through its block table, so any slip in the bookkeeping of blocks, positions or slots shows as a wrong token,
and a breach of the contract of `workers.step` raises `ContractBroken`. `generate_alone` is the independent oracle: it
knows neither blocks nor steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from cluster.router.sequence import FinishReason, SequenceRequest
from workers.step import Draft, OpenSlot, Prefill, SamplingParams, StepPlan, StepResult, TokenLogprobs


class ContractBroken(AssertionError):
    """A plan that no rank may be asked to execute."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise ContractBroken(message)


def next_token(
    token_ids: Tokens[int], seed: int, vocab_size: int, banned: Collection[int] = (), reach: int | None = None
) -> int:
    """The fake model: depends on every token and its place, and on the seed. The first of those that may come.

    With `reach`, it depends on so many of the last tokens alone, and soon repeats itself.
    """
    first = hash((seed, *(token_ids if reach is None else token_ids[-reach:]))) % vocab_size
    order = [*range(first, vocab_size), *range(first)]
    return next((token for token in order if token not in banned), first)


def fake_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """A token's logprob is its id, negated: enough to see whether it reaches the right token."""
    return TokenLogprobs(-float(token_id), [(token_id, -float(token_id))] * num_top)


def banned_tokens(words: Iterable[Tokens[int]], output_ids: Tokens[int]) -> set[int]:
    """What would complete a bad word, by definition: the output and the token end with it."""
    return {word[-1] for word in words if [*output_ids, word[-1]][-len(word) :] == list(word)}


def generate_alone(
    request: SequenceRequest, *, context_limit: int, vocab_size: int = 50, reach: int | None = None
) -> tuple[list[int], FinishReason]:
    """What the request must yield whatever else runs."""
    token_ids = list(request.prompt_ids)
    output_ids: list[int] = []
    budget = request.thinking_budget if request.starts_thinking else None
    while len(output_ids) < request.max_tokens and len(token_ids) < context_limit:
        if budget is not None and request.think_end_id not in output_ids and len(output_ids) >= budget:
            room = min(request.max_tokens - len(output_ids), context_limit - len(token_ids))
            forced, budget = request.close_thinking_ids[:room], None
            output_ids += forced
            token_ids += forced
            continue
        banned = banned_tokens(request.bad_words, output_ids)
        is_early = len(output_ids) < request.min_tokens
        if is_early:
            banned |= request.stop_token_ids
        output_ids.append(next_token(token_ids, request.sampling.seed, vocab_size, banned, reach))
        token_ids.append(output_ids[-1])
        if output_ids[-1] in request.stop_token_ids and not is_early:
            return output_ids, FinishReason.STOP
    return output_ids, FinishReason.LENGTH


@dataclass
class FakeSlot:
    """What a rank keeps of an open slot."""

    opened: OpenSlot
    block_ids: list[int]
    num_computed: int
    sampled: list[int] = field(default_factory=list)
    """Tokens sampled since the slot was opened."""


class FakeRanks:
    """All ranks of one attention group at once; `execute` gives the result of the first of them."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        vocab_size: int = 50,
        group: int = 0,
        rank: int = 0,
        reach: int | None = None,
        num_host_blocks: int = 0,
    ) -> None:
        """`reach`: of the fake model, see `next_token`."""
        self.reach = reach
        self.group = group
        self.rank = rank
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.vocab_size = vocab_size
        self.memory: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.host_memory: list[list[int | None]] = [[None] * block_size for _ in range(num_host_blocks)]
        self.slots: dict[int, FakeSlot] = {}
        self.num_holders: Counter[int] = Counter()
        """How many open slots have this block in their table."""
        self.next_step: int | None = None
        """None: ranks that are new go on with whatever step their copy is at."""
        self.num_computed_total = 0

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan. Raises ContractBroken."""
        self._check(plan)
        self.next_step = plan.step + 1
        self.num_computed_total += plan.num_tokens
        self._copy_blocks(plan)
        for slot in plan.close:
            self._close(slot)
        for opened in plan.open:
            self._open(opened)
        for extended in plan.extend:
            expect(extended.slot in self.slots, f"slot {extended.slot} is extended, but not open")
            self._hold(self.slots[extended.slot], extended.block_ids)
        for prefill in plan.prefills:
            self._prefill(prefill)
        for slot in plan.decodes:
            self._decode(slot)
        for draft in plan.drafts:
            self._guess(draft)
        # Sampling comes after all writes, as in one forward pass of a batch.
        token_ids = [self._sample(slot) for slot in plan.sampling_slots]
        accepted_ids = [self._accept(draft) for draft in plan.drafts]
        logprobs = self._logprobs(plan.sampling_slots, token_ids)
        scores = {
            index: [fake_logprobs(target, prefill.score.num_logprobs) for target in prefill.score.target_ids]
            for index, prefill in enumerate(plan.prefills)
            if prefill.score is not None
        }
        return StepResult(plan.step, self.rank, token_ids, accepted_ids, logprobs=logprobs, prompt_logprobs=scores)

    def _check(self, plan: StepPlan) -> None:
        expect(self.next_step in (None, plan.step), f"step {plan.step} came, {self.next_step} was due")
        num_tokens = plan.num_tokens
        group_tokens = plan.group_tokens or [num_tokens]
        expect(any(group_tokens), f"step {plan.step} computes nothing")
        if group_tokens[self.group] != num_tokens:
            raise ContractBroken(
                f"group {self.group} computes {num_tokens} tokens in step {plan.step}, it says {group_tokens}"
            )
        expect(
            num_tokens <= self.max_num_batched_tokens,
            f"{num_tokens} tokens in a step, the budget is {self.max_num_batched_tokens}",
        )
        computed = [prefill.slot for prefill in plan.prefills] + plan.decodes
        drafted = [draft.slot for draft in plan.drafts]
        if not set(plan.decodes).issuperset(drafted):
            raise ContractBroken(f"slots {drafted} have drafts, but only {plan.decodes} decode")
        for name, slots in (
            ("computed", computed),
            ("drafted", drafted),
            ("closed", plan.close),
            ("opened", [opened.slot for opened in plan.open]),
            ("extended", [extended.slot for extended in plan.extend]),
        ):
            if len(set(slots)) != len(slots):
                raise ContractBroken(f"a slot is {name} twice in step {plan.step}: {slots}")

    def _copy_blocks(self, plan: StepPlan) -> None:
        """In any order within each list, as ranks may: a block is written once, and not also read."""
        targets = [host_id for _, host_id in plan.offload] + [block_id for _, block_id in plan.fetch]
        for name, blocks in (("offloaded to", targets[: len(plan.offload)]), ("fetched", targets[len(plan.offload) :])):
            if len(set(blocks)) != len(blocks):
                raise ContractBroken(f"a block is {name} twice in step {plan.step}: {blocks}")
        for block_id, host_id in plan.offload:
            expect(None not in self.memory[block_id], f"block {block_id} is kept, but not full")
            self.host_memory[host_id] = self.memory[block_id].copy()
        for host_id, block_id in plan.fetch:
            expect(None not in self.host_memory[host_id], f"host block {host_id} is fetched, but nothing was kept")
            self.memory[block_id] = self.host_memory[host_id].copy()

    def _close(self, slot: int) -> None:
        expect(slot in self.slots, f"slot {slot} is closed, but not open")
        self.num_holders.subtract(self.slots.pop(slot).block_ids)

    def _open(self, opened: OpenSlot) -> None:
        expect(0 <= opened.slot < self.max_num_seqs, f"there is no slot {opened.slot}")
        expect(opened.slot not in self.slots, f"slot {opened.slot} is opened twice")
        state = self.slots[opened.slot] = FakeSlot(opened, [], opened.num_cached)
        self._hold(state, opened.block_ids)
        self._read(state)

    def _hold(self, state: FakeSlot, block_ids: list[int]) -> None:
        expect(all(0 <= block_id < len(self.memory) for block_id in block_ids), f"unknown block in {block_ids}")
        expect(bool(block_ids), f"slot {state.opened.slot} is given no blocks")
        state.block_ids += block_ids
        expect(len(set(state.block_ids)) == len(state.block_ids), f"a block is twice in the table {state.block_ids}")
        self.num_holders.update(block_ids)

    def _prefill(self, prefill: Prefill) -> None:
        expect(prefill.slot in self.slots, f"slot {prefill.slot} is prefilled, but not open")
        state = self.slots[prefill.slot]
        expect(bool(prefill.token_ids), f"slot {prefill.slot} has an empty prefill")
        expect(
            prefill.start == state.num_computed,
            f"slot {prefill.slot} is prefilled from {prefill.start}, but {state.num_computed} are computed",
        )
        if prefill.score is not None:
            targets = prefill.score.target_ids
            expect(0 < len(targets) <= len(prefill.token_ids), f"slot {prefill.slot} scores {len(targets)} rows")
            expect(
                targets[: len(prefill.token_ids) - 1] == prefill.token_ids[1 : len(targets) + 1],
                f"slot {prefill.slot} scores tokens that do not follow its rows",
            )
        self._write(state, prefill.token_ids)

    def _decode(self, slot: int) -> None:
        expect(slot in self.slots, f"slot {slot} is decoded, but not open")
        state = self.slots[slot]
        expect(bool(state.sampled), f"slot {slot} is decoded, but has sampled nothing since it was opened")
        self._write(state, state.sampled[-1:])

    def _guess(self, draft: Draft) -> None:
        state = self.slots[draft.slot]
        sampling = state.opened.sampling
        depends = state.opened.rules is not None or sampling.has_penalties or sampling.num_logprobs is not None
        expect(not depends, f"slot {draft.slot} has a draft, but rules, penalties or logprobs")
        expect(bool(draft.token_ids), f"slot {draft.slot} has an empty draft")
        self._write(state, draft.token_ids)
        state.num_computed -= len(draft.token_ids)  # until they are found right

    def _accept(self, draft: Draft) -> list[int]:
        """What was sampled behind the guesses that were right."""
        state, accepted = self.slots[draft.slot], []
        for guess in draft.token_ids:
            if state.sampled[-1] != guess:
                break
            state.num_computed += 1
            accepted.append(self._sample(draft.slot))
        return accepted

    def _write(self, state: FakeSlot, token_ids: list[int]) -> None:
        for position, token_id in enumerate(token_ids, start=state.num_computed):
            index, offset = divmod(position, self.block_size)
            expect(index < len(state.block_ids), f"slot {state.opened.slot} has no block for position {position}")
            block_id = state.block_ids[index]
            expect(self.num_holders[block_id] == 1, f"block {block_id} is written, but another slot has it, too")
            self.memory[block_id][offset] = token_id
        state.num_computed += len(token_ids)

    def _read(self, state: FakeSlot) -> list[int]:
        """The computed tokens of a slot, as attention sees them."""
        token_ids: list[int] = []
        for index in range(-(-state.num_computed // self.block_size)):
            here = self.memory[state.block_ids[index]][: state.num_computed - index * self.block_size]
            token_ids += [token_id for token_id in here if token_id is not None]
            expect(None not in here, f"block {state.block_ids[index]} is read before it is written")
        return token_ids

    def _sample(self, slot: int) -> int:
        state = self.slots[slot]
        token_ids = self._read(state)
        if state.opened.sampling.has_penalties:
            counted = state.opened.prompt_ids + state.opened.output_ids + state.sampled
            expect(token_ids == counted, f"slot {slot} counts other tokens for penalties than it computes")
        seed = state.opened.sampling.seed
        sampled = next_token(token_ids, seed, self.vocab_size, self._banned(state), self.reach)
        state.sampled.append(sampled)
        return sampled

    def _banned(self, state: FakeSlot) -> set[int]:
        rules = state.opened.rules
        if rules is None:
            return set()
        output_ids = state.opened.output_ids + state.sampled
        early = rules.stop_ids if state.num_computed < rules.first_stop_position else []
        return banned_tokens(rules.bad_words, output_ids) | set(early)

    def _logprobs(self, slots: list[int], token_ids: list[int]) -> dict[int, TokenLogprobs]:
        """Each token's logprob is its id, negated: enough to see whether it reaches the right token."""
        asked: dict[int, TokenLogprobs] = {}
        for index, (slot, token_id) in enumerate(zip(slots, token_ids, strict=True)):
            params: SamplingParams = self.slots[slot].opened.sampling
            if params.num_logprobs is not None:
                asked[index] = fake_logprobs(token_id, params.num_logprobs)
        return asked
