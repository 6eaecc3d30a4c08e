"""Token rules on a sampler's logits: bias, bad words, early stops; alone, in a batch, and on two ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.ranks import RankProcesses
from tests.workers.test_sampling import VOCAB_SIZE, logprobs_of, random_logits
from workers.candidates import CandidateExchange
from workers.layout import split_evenly
from workers.parallel import ParallelState
from workers.sampling import Sampler
from workers.step import OpenSlot, SamplingParams, TokenRules

GREEDY = SamplingParams(temperature=0.0)


def make_sampler(parallel: ParallelState, opened: list[OpenSlot]) -> Sampler:
    parts = [split_evenly(VOCAB_SIZE, parallel.tp.size, rank) for rank in range(parallel.tp.size)]
    sampler = Sampler(len(opened), CandidateExchange(parallel.tp, parts), torch.device("cpu"))
    for one in opened:
        sampler.open(one)
    return sampler


def open_with(rules: TokenRules | None, *, slot: int = 0, sampling: SamplingParams = GREEDY, **more: Any) -> OpenSlot:
    return OpenSlot(slot, [0], 0, sampling, rules=rules, **more)


def sample(sampler: Sampler, logits_BV: Tensor, position: int = 5) -> list[int]:
    """One token for each slot; the sampler takes note of them."""
    slots = np.arange(len(logits_BV))
    token_ids: list[int] = sampler.sample(logits_BV, slots, np.full(len(slots), position)).token_ids_B.tolist()
    sampler.rules.advance(slots, token_ids)
    return token_ids


def by_likelihood(logits_BV: Tensor) -> list[int]:
    ids: list[int] = logits_BV[0].sort(descending=True).indices.tolist()
    return ids


def test_a_bias_is_added_to_the_raw_logits() -> None:
    logits = random_logits(1)
    best, second, third = by_likelihood(logits)[:3]
    gap = float(logits[0, best] - logits[0, third])

    rules = TokenRules(logit_bias=[(third, gap + 1e-3), (second, -100.0)])

    assert sample(make_sampler(ParallelState.single(), [open_with(rules)]), logits) == [third]


def test_logprobs_are_those_of_the_biased_distribution_and_masked_tokens_are_none_of_the_likeliest() -> None:
    logits = random_logits(1)
    best, second = by_likelihood(logits)[:2]
    rules = TokenRules(logit_bias=[(second, 3.0)], bad_words=[[best]])
    sampling = SamplingParams(temperature=0.0, num_logprobs=VOCAB_SIZE)
    sampler = make_sampler(ParallelState.single(), [open_with(rules, sampling=sampling)])

    answer = logprobs_of(sampler.sample(logits.clone(), np.array([0]), np.array([5])))[0]

    changed = logits[0].clone()
    changed[second] += 3.0
    changed[best] = -torch.inf
    assert abs(answer.logprob - float(changed.log_softmax(-1).max())) < 1e-5  # fp32 sums in another order
    assert len(answer.top) == VOCAB_SIZE - 1


def test_a_bad_word_of_one_token_never_comes() -> None:
    logits = random_logits(1)
    best, second = by_likelihood(logits)[:2]

    assert sample(make_sampler(ParallelState.single(), [open_with(TokenRules(bad_words=[[best]]))]), logits) == [second]


def test_the_last_token_of_a_bad_word_is_masked_where_the_others_precede_it() -> None:
    logits = random_logits(1)
    a, b = by_likelihood(logits)[:2]
    sampler = make_sampler(ParallelState.single(), [open_with(TokenRules(bad_words=[[a, a, a]]))])

    assert [sample(sampler, logits)[0] for _ in range(7)] == [a, a, b, a, a, b, a]


def test_a_slot_that_is_opened_again_with_its_output_goes_on() -> None:
    logits = random_logits(1)
    a, b = by_likelihood(logits)[:2]
    rules = TokenRules(bad_words=[[a, a, a]])
    sampler = make_sampler(ParallelState.single(), [open_with(rules)])
    first = [sample(sampler, logits)[0] for _ in range(2)]

    sampler.open(open_with(rules, output_ids=first))

    assert sample(sampler, logits) == [b]
    sampler.open(open_with(None))
    assert sample(sampler, logits) == [a]


def test_stop_tokens_are_masked_before_their_first_position() -> None:
    logits = random_logits(1)
    best, second = by_likelihood(logits)[:2]
    rules = TokenRules(stop_ids=[best], first_stop_position=9)
    sampler = make_sampler(ParallelState.single(), [open_with(rules)])

    assert [sample(sampler, logits, position)[0] for position in (7, 8, 9)] == [second, second, best]


def test_rows_without_rules_keep_their_tokens_beside_one_with_rules() -> None:
    logits = random_logits(3)
    rules = TokenRules(logit_bias=[(4, 100.0)])
    opened = [open_with(None), open_with(rules, slot=1), open_with(None, slot=2)]

    assert sample(make_sampler(ParallelState.single(), opened), logits) == [
        int(logits[0].argmax()),
        4,
        int(logits[2].argmax()),
    ]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=4), st.integers(0, 2**16))
def test_no_bad_word_is_ever_in_the_output(words: list[list[int]], seed: int) -> None:
    logits = random_logits(1, seed) - 50
    logits[:, :4] += 100  # the four tokens of the words are far likelier than all others
    sampling = SamplingParams(temperature=1.0, top_k=0, seed=seed)
    sampler = make_sampler(ParallelState.single(), [open_with(TokenRules(bad_words=words), sampling=sampling)])

    output = [sample(sampler, logits, position)[0] for position in range(30)]

    for word in words:
        assert all(output[start : start + len(word)] != word for start in range(len(output)))


def sample_on_rank(parallel: ParallelState, steps: list[Tensor]) -> list[list[int]]:
    """Greedy and seeded rows with rules over all of the vocabulary, step by step on this rank's part of it."""
    favourites = [(token, 2.0) for token in range(0, VOCAB_SIZE, 7)]
    words = [[token, token] for token in range(0, VOCAB_SIZE, 2)] + [[3], [390]]
    rules = TokenRules(logit_bias=favourites, bad_words=words, stop_ids=[7, 399], first_stop_position=3)
    params = [GREEDY, SamplingParams(temperature=1.0, top_k=0, seed=1), SamplingParams(seed=2, presence_penalty=1.0)]
    opened = [open_with(rules, slot=slot, sampling=sampling) for slot, sampling in enumerate(params)]
    sampler, vocab = make_sampler(parallel, opened), split_evenly(VOCAB_SIZE, parallel.tp.size, parallel.tp.index)
    return [sample(sampler, logits[:, vocab.start : vocab.stop].clone(), step) for step, logits in enumerate(steps)]


def test_two_ranks_sample_what_one_does(two_ranks: RankProcesses) -> None:
    steps = [random_logits(1, seed=step // 3).expand(3, -1) for step in range(12)]

    alone = sample_on_rank(ParallelState.single(), steps)

    assert two_ranks.run(sample_on_rank, steps) == [alone, alone]
