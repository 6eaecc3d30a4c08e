"""What crosses the socket between the Router and its ranks: the contract of hop 6.

Plain integers and floats in msgspec structs, so that the scheduler, the planner and the tests can use it without
torch. A plan carries deltas only: slots opened, extended, closed, and the tokens to compute. Plans are numbered; every
rank executes them strictly in order, and the Router may send plan n+1 before the result of plan n is back.
Knows nothing of requests, clients or phases.
"""

from __future__ import annotations

from typing import Literal

import msgspec

GrammarKind = Literal["json_schema", "json_object", "regex", "ebnf"]


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """How one slot samples. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 mean no limit."""

    temperature: float = 0.6
    top_k: int = 20
    top_p: float = 0.95
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    """Noise for the token at position p comes from (seed, p) alone. [0, 2**63)."""
    num_logprobs: int | None = None
    """None: no logprobs; k: the sampled token's logprob and those of the k likeliest tokens."""

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What a slot's output must match."""

    kind: GrammarKind
    text: str
    """Empty for "json_object"."""
    start_id: int | None = None
    """It matches what follows this token, the end of the thoughts; None: all of the output."""


class TokenRules(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Which tokens a slot may sample, and which it leans to."""

    logit_bias: list[tuple[int, float]] = []
    """(token id, what is added to its raw logit)."""
    bad_words: list[list[int]] = []
    """Sequences of token ids that must not come."""
    stop_ids: list[int] = []
    """What ends the sequence; needed by the next two."""
    first_stop_position: int = 0
    """Stop ids are not sampled at positions of the sequence before this one."""
    grammar: Grammar | None = None

    @property
    def needs_output(self) -> bool:
        """What a token may be depends on the output before it."""
        return self.grammar is not None or any(len(word) > 1 for word in self.bad_words)


class OpenSlot(msgspec.Struct, frozen=True, array_like=True):
    """A sequence takes a slot. Positions [0, num_cached) already lie in its first blocks."""

    slot: int
    block_ids: list[int]
    num_cached: int
    sampling: SamplingParams
    prompt_ids: list[int] = []
    """Only with penalties: the prompt, which the repetition penalty counts."""
    output_ids: list[int] = []
    """Only with penalties or rules that need it: output before this slot was opened (after a preemption, a replay, or
    tokens that were forced)."""
    rules: TokenRules | None = None
    """None: every token may come."""


class ExtendSlot(msgspec.Struct, frozen=True, array_like=True):
    """Blocks appended to a slot's block table, in order."""

    slot: int
    block_ids: list[int]


class Score(msgspec.Struct, frozen=True, array_like=True):
    """Rows of a chunk whose logits are asked for the logprobs of known tokens: those of the prompt itself."""

    target_ids: list[int]
    """For the first rows of the chunk, the token that follows each: the last may be the first of the next chunk."""
    num_logprobs: int
    """How many of the likeliest tokens are named beside each."""


class Prefill(msgspec.Struct, frozen=True, array_like=True):
    """Known tokens to put through the model at positions [start, start + len(token_ids)).

    With `sample`, the logits after the last of them give the slot's next token.
    """

    slot: int
    start: int
    token_ids: list[int]
    sample: bool
    score: Score | None = None


class Draft(msgspec.Struct, frozen=True, array_like=True):
    """A guess at the tokens that a decoding slot samples next: put through the model behind the one it has.

    Its first token is kept where the slot samples it, the second where the first was kept, and so on. What is sampled
    after the last one that was kept is the slot's next token, as always: a wrong guess costs its rows, and no token.
    """

    slot: int
    token_ids: list[int]


class StepPlan(msgspec.Struct, frozen=True, tag="plan"):
    """One forward pass.

    Applied in this order: offload, fetch, close, open, extend, then compute prefills and decodes as one batch.
    """

    step: int
    offload: list[tuple[int, int]] = []
    """(block, host block): KV to keep in the host's memory, before anything is written over it."""
    fetch: list[tuple[int, int]] = []
    """(host block, block): KV to bring back. A slot whose table has that block may be opened by this very plan."""
    close: list[int] = []
    open: list[OpenSlot] = []
    extend: list[ExtendSlot] = []
    prefills: list[Prefill] = []
    decodes: list[int] = []
    """Slots whose input is the token they sampled last, at the position after their last computed one."""
    drafts: list[Draft] = []
    """For some of `decodes`. Slots with rules, penalties or logprobs have none."""
    group_tokens: list[int] = []
    """Tokens that each attention group of the copy computes in this step; empty: this group is the only one.

    Ranks of a group without tokens still take part in every MoE layer.
    """
    report_loads: bool = False
    """The result shall bring `StepResult.expert_loads`."""

    @property
    def sampling_slots(self) -> list[int]:
        """The slots that get a token from this step, in the order in which `StepResult.token_ids` names them."""
        return [p.slot for p in self.prefills if p.sample] + self.decodes

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step: what the token budget counts."""
        guessed = sum(len(draft.token_ids) for draft in self.drafts)
        return sum(len(p.token_ids) for p in self.prefills) + len(self.decodes) + guessed


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probabilities of the unscaled, penalised distribution (before temperature and cuts)."""

    logprob: float
    top: list[tuple[int, float]]
    """(token id, logprob), likeliest first."""


class StepResult(msgspec.Struct, frozen=True, tag="result"):
    """A rank finished a plan. tp_rank 0 of a group names its tokens; others' empty lists say that they are alive."""

    step: int
    rank: int
    token_ids: list[int] = []
    """One token per slot of `StepPlan.sampling_slots`, in its order."""
    accepted_ids: list[list[int]] = []
    """For each of `StepPlan.drafts`, the tokens that its slot sampled behind that one."""
    logprobs: dict[int, TokenLogprobs] = {}
    """Index into `token_ids` → logprobs, for the slots that asked."""
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    """Index into `StepPlan.prefills` → of the targets of its `score`, in the unchanged distribution."""
    compute_s: float = 0.0
    dispatch_s: float = 0.0
    """Of that, in dispatch and combine: bringing tokens to experts, and results back."""
    dispatch_bytes: int = 0
    """Sent to other ranks for it."""
    expert_loads: list[list[int]] = []
    """For each MoE layer, tokens of each of this rank's physical slots since its last report. Only when asked for."""


class PlacementUpdate(msgspec.Struct, frozen=True, tag="placement"):
    """Where experts lie from the next plan on. Sent in order with the plans; ranks move the weights that change."""

    version: int
    layers: list[list[int]]
    """For every MoE layer, physical slot -> logical expert; -1: empty. `workers.placement_map` numbers the slots."""


class RankLoading(msgspec.Struct, frozen=True, tag="loading"):
    """Progress of one rank's weights."""

    rank: int
    read_bytes: int
    total_bytes: int


class HostMemory(msgspec.Struct, frozen=True, array_like=True):
    """Room for KV in the memory of a rank's host, and what tells whether it pays to use it, all measured."""

    num_blocks: int
    copy_s: float
    """One block, one way."""
    token_s: float
    """What a known token adds to a step."""
    step_s: float
    """A step of one decode."""


class RankReady(msgspec.Struct, frozen=True, tag="ready"):
    """A rank has loaded its slice, sized its KV and can take plans."""

    rank: int
    pid: int
    host: str
    device: str
    num_blocks: int
    block_size: int
    weight_bytes: int
    kv_bytes: int
    load_s: float
    host_memory: HostMemory | None = None
    """None: no KV is kept there."""


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    """A rank cannot go on. `message` is one line with the remedy where there is one; `detail` is for the log."""

    rank: int
    message: str
    detail: str = ""


class RankPulse(msgspec.Struct, frozen=True, tag="pulse"):
    """A rank's process lives, whatever its steps do."""

    rank: int
    num_exchanges: int
    """Of all ranks, begun so far: of those that wait for one another, one that is behind keeps the others waiting."""
    num_group_exchanges: int = 0
    """Of its attention group alone, where that is not all ranks."""


class WakeUp(msgspec.Struct, frozen=True, tag="wake"):
    """To a rank's pulse: who waits for other ranks waits no longer, so that one that hangs by itself is told apart.

    The group is of no use afterwards, and results are not, either.
    """


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """The Router asks a rank to end."""


ToRank = StepPlan | PlacementUpdate | Shutdown
FromRank = StepResult | RankLoading | RankReady | RankFailed | RankPulse

encode = msgspec.msgpack.Encoder().encode
decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode
decode_to_pulse = msgspec.msgpack.Decoder(WakeUp).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
