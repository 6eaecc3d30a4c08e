"""Sampling against an independent implementation, and what it must not depend on: batch, ranks, slot."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.workers.ranks import RankProcesses
from workers.candidates import CandidateExchange
from workers.layout import split_evenly
from workers.parallel import ParallelState
from workers.sampling import MAX_EXCHANGED, Sampled, Sampler
from workers.step import OpenSlot, SamplingParams, TokenLogprobs
from workers.transfers import fetching_from

VOCAB_SIZE = 401
NUM_DRAWS = 20_000

CUTS = {
    "temperature alone": SamplingParams(temperature=0.7, top_k=0, top_p=1.0),
    "top_k": SamplingParams(temperature=1.0, top_k=5, top_p=1.0),
    "top_p": SamplingParams(temperature=1.0, top_k=0, top_p=0.6),
    "min_p": SamplingParams(temperature=1.3, top_k=0, top_p=1.0, min_p=0.2),
    "top_k, then top_p, then min_p": SamplingParams(temperature=0.6, top_k=20, top_p=0.9, min_p=0.03),
    "penalties": SamplingParams(
        temperature=1.0, top_k=50, top_p=1.0, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.4
    ),
}
PROMPT_IDS, OUTPUT_IDS = [3, 5, 5, 250], [5, 9, 9, 9, 300]


def logprobs_of(sampled: Sampled) -> dict[int, TokenLogprobs]:
    fetch = fetching_from(torch.device("cpu"))
    return {row: logprobs for table in sampled.logprobs for row, logprobs in table.send(fetch).each()}


def random_logits(num_rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def tied_logits(num_rows: int, seed: int = 0) -> Tensor:
    """Whole numbers: hundreds of tokens share some twenty values, zero with either sign among them."""
    return random_logits(num_rows, seed).round()


LOGITS = {"distinct": random_logits, "tied": tied_logits}


def opened(slot: int, sampling: SamplingParams) -> OpenSlot:
    prompt, output = (PROMPT_IDS, OUTPUT_IDS) if sampling.has_penalties else ([], [])
    return OpenSlot(slot, [0], 0, sampling, prompt, output)


def make_sampler(parallel: ParallelState, params: list[SamplingParams]) -> Sampler:
    parts = [split_evenly(VOCAB_SIZE, parallel.tp.size, rank) for rank in range(parallel.tp.size)]
    sampler = Sampler(len(params), CandidateExchange(parallel.tp, parts), torch.device("cpu"))
    for slot, sampling in enumerate(params):
        sampler.open(opened(slot, sampling))
    return sampler


def draw(params: list[SamplingParams], logits_BV: Tensor, positions: list[int]) -> Sampled:
    sampler = make_sampler(ParallelState.single(), params)
    return sampler.sample(logits_BV, np.arange(len(params)), np.array(positions))


def tokens_of(params: list[SamplingParams], logits_BV: Tensor, positions: list[int]) -> list[int]:
    token_ids: list[int] = draw(params, logits_BV, positions).token_ids_B.tolist()
    return token_ids


def with_seed(sampling: SamplingParams, seed: int) -> SamplingParams:
    fields = {name: getattr(sampling, name) for name in sampling.__struct_fields__}
    return SamplingParams(**(fields | {"seed": seed}))


def penalize(logits: list[float], sampling: SamplingParams) -> list[float]:
    out = list(logits)
    for token in range(len(out)):
        count = OUTPUT_IDS.count(token)
        if token in PROMPT_IDS or count:
            out[token] = (
                out[token] / sampling.repetition_penalty if out[token] > 0 else out[token] * sampling.repetition_penalty
            )
        if count:
            out[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return out


def expected_distribution(logits: list[float], sampling: SamplingParams) -> dict[int, float]:
    """The distribution in plain Python: penalties, temperature, top_k, top_p, min_p, each renormalised."""
    if sampling.has_penalties:
        logits = penalize(logits, sampling)
    weights = {token: math.exp(logit / sampling.temperature) for token, logit in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: -weights[token])
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    total, kept, mass = sum(weights[token] for token in ranked), [], 0.0
    for token in ranked:
        if mass >= sampling.top_p:
            break
        kept.append(token)
        mass += weights[token] / total
    kept = [token for token in kept if weights[token] >= sampling.min_p * weights[kept[0]]]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize("name", CUTS)
def test_draws_follow_the_independent_distribution(name: str) -> None:
    logits = random_logits(1)
    sampler = make_sampler(ParallelState.single(), [CUTS[name]])
    drawn = torch.zeros(VOCAB_SIZE)
    for start in range(0, NUM_DRAWS, 1000):
        slots = np.zeros(1000, dtype=np.int64)
        # One slot at a thousand positions; its counts are put back, so that every draw sees the same penalties.
        sampler.open(opened(0, with_seed(CUTS[name], 7)))
        ids = sampler.sample(logits.expand(1000, -1).clone(), slots, np.arange(start, start + 1000)).token_ids_B
        drawn += torch.bincount(ids, minlength=VOCAB_SIZE)

    expected = expected_distribution(logits[0].tolist(), CUTS[name])

    assert set(drawn.nonzero().flatten().tolist()) <= expected.keys()
    distance = sum(abs(drawn[token].item() / NUM_DRAWS - prob) for token, prob in expected.items()) / 2
    # The mean total variation distance of n draws from k outcomes is about sqrt(k / (2 pi n)); twice that is generous.
    assert distance < 2 * math.sqrt(len(expected) / (2 * math.pi * NUM_DRAWS))


@pytest.mark.parametrize("name", CUTS)
def test_different_seeds_draw_independently(name: str) -> None:
    logits = random_logits(1).expand(2, -1)
    params = [with_seed(CUTS[name], seed) for seed in (1, 2)]
    pairs = [tokens_of(params, logits, [position, position]) for position in range(300)]
    expected = sum(prob**2 for prob in expected_distribution(logits[0].tolist(), CUTS[name]).values())
    matches = sum(first == second for first, second in pairs) / len(pairs)
    assert abs(matches - expected) < 4 * math.sqrt(expected * (1 - expected) / len(pairs)) + 1e-9


def test_greedy_takes_the_likeliest_token_whatever_the_cuts() -> None:
    logits = random_logits(3)
    params = [SamplingParams(temperature=0.0, top_k=k, top_p=0.5, seed=k) for k in (0, 1, 20)]
    assert tokens_of(params, logits, [4, 4, 4]) == logits.argmax(dim=-1).tolist()


def test_a_tiny_top_p_keeps_the_likeliest_token() -> None:
    logits = random_logits(1)
    assert tokens_of([SamplingParams(top_p=1e-9, top_k=0)], logits, [1]) == logits.argmax(dim=-1).tolist()


def mixed_params() -> list[SamplingParams]:
    """Narrow, wide, greedy and penalised rows side by side, some with logprobs."""
    cuts = [*CUTS.values(), SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, presence_penalty=9.0)]
    many = SamplingParams(temperature=0.8, top_k=MAX_EXCHANGED + 40, top_p=0.99)
    asking = [SamplingParams(top_k=5, num_logprobs=7), SamplingParams(temperature=0.0, num_logprobs=0)]
    wide = SamplingParams(top_k=0, num_logprobs=3, repetition_penalty=1.2)
    return [with_seed(sampling, 100 + index) for index, sampling in enumerate([*cuts, many, *asking, wide])]


@pytest.mark.parametrize("kind", LOGITS)
def test_a_rows_token_does_not_depend_on_its_batch(kind: str) -> None:
    params = mixed_params()
    logits = LOGITS[kind](len(params), seed=2)
    positions = list(range(50, 50 + len(params)))
    together = tokens_of(params, logits, positions)
    alone = [tokens_of([sampling], logits[row : row + 1], [positions[row]])[0] for row, sampling in enumerate(params)]
    backwards = tokens_of(params[::-1], logits.flip(0), positions[::-1])[::-1]
    assert together == alone == backwards


@pytest.mark.parametrize("neighbour", [1, 2, 30, MAX_EXCHANGED, 0], ids="beside top_k {}".format)
@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SamplingParams(top_k=20)], ids=["greedy", "20"])
def test_equal_logits_rank_by_token_id_whatever_the_neighbours(sampling: SamplingParams, neighbour: int) -> None:
    logits = torch.cat([tied_logits(2, seed=3), torch.zeros(2, VOCAB_SIZE)])
    asking = SamplingParams(temperature=sampling.temperature, top_k=sampling.top_k, num_logprobs=9)
    params = [sampling, asking, sampling, SamplingParams(top_k=neighbour)]

    for position in range(30):
        sampled = draw(params, logits, [position] * 4)
        alone = [tokens_of([sampling], logits[row : row + 1], [position])[0] for row in range(3)]
        assert sampled.token_ids_B.tolist()[:3] == alone
        ranked = [sorted(range(VOCAB_SIZE), key=lambda token: (-row[token], token)) for row in logits.tolist()]
        assert all(token in ranked[row][: max(sampling.top_k, 1)] for row, token in enumerate(alone))
        assert [token for token, _ in logprobs_of(sampled)[1].top] == ranked[1][:9]


def test_candidates_are_the_first_of_the_whole_order_with_their_exact_logits() -> None:
    extremes = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
    logits = torch.cat([tied_logits(5), random_logits(5), extremes.repeat(51)[:VOCAB_SIZE].expand(1, -1)])
    exchange = make_sampler(ParallelState.single(), []).exchange
    whole = exchange.everything(logits)
    for count in (1, 2, 7, 120, VOCAB_SIZE - 1, VOCAB_SIZE):
        likeliest = exchange.likeliest(logits, count)
        assert torch.equal(likeliest.token_ids_BC, whole.token_ids_BC[:, :count])
        assert torch.equal(likeliest.logits_BC, whole.logits_BC[:, :count])


def sample_on_rank(parallel: ParallelState, params: list[SamplingParams], steps: list[Tensor]) -> list[Any]:
    sampler = make_sampler(parallel, params)
    vocab = sampler.exchange.vocab
    answers = []
    for step, logits_BV in enumerate(steps):
        slots, positions = np.arange(len(params)), np.full(len(params), step)
        sampled = sampler.sample(logits_BV[:, vocab.start : vocab.stop].clone(), slots, positions)
        answers.append((sampled.token_ids_B.tolist(), logprobs_of(sampled)))
    return answers


ROWS = {"mixed": slice(None), "only narrow": slice(1, 2), "only wide": slice(2, 4), "only greedy": slice(6, 8)}


@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("rows", ROWS)
def test_two_ranks_draw_what_one_draws(rows: str, kind: str, two_ranks: RankProcesses) -> None:
    params = mixed_params()[ROWS[rows]]
    steps = [LOGITS[kind](len(params), seed=seed) for seed in range(6)]

    alone = sample_on_rank(ParallelState.single(), params, steps)
    ranks = two_ranks.run(sample_on_rank, params, steps)

    for answers in ranks:
        for (tokens, logprobs), (want_tokens, want_logprobs) in zip(answers, alone, strict=True):
            assert tokens == want_tokens
            assert logprobs.keys() == want_logprobs.keys()
            for row, want in want_logprobs.items():
                assert logprobs[row].logprob == pytest.approx(want.logprob, abs=1e-5)
                assert [token for token, _ in logprobs[row].top] == [token for token, _ in want.top]


def test_sampled_tokens_count_towards_later_penalties() -> None:
    logits = random_logits(1)
    first, second = logits[0].topk(2).indices.tolist()
    sampler = make_sampler(ParallelState.single(), [SamplingParams(temperature=0.0, presence_penalty=50.0)])
    drawn = [
        sampler.sample(logits.clone(), np.array([0]), np.array([position])).token_ids_B.item() for position in (1, 2)
    ]
    assert drawn == [first, second]


def test_a_new_sequence_in_a_slot_starts_without_the_old_ones_counts() -> None:
    logits = random_logits(1)
    params = SamplingParams(temperature=0.0, presence_penalty=50.0)
    sampler = make_sampler(ParallelState.single(), [params])
    sampler.open(OpenSlot(0, [0], 0, params))
    first = sampler.sample(logits.clone(), np.array([0]), np.array([1])).token_ids_B.item()
    sampler.open(OpenSlot(0, [0], 0, params))
    assert sampler.sample(logits.clone(), np.array([0]), np.array([1])).token_ids_B.item() == first


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_logprobs_are_those_of_the_penalised_distribution_before_temperature(temperature: float) -> None:
    logits = random_logits(1)
    sampling = SamplingParams(temperature=temperature, top_k=3, repetition_penalty=1.5, num_logprobs=6)

    sampled = draw([sampling], logits.clone(), [9])

    want = torch.tensor(penalize(logits[0].tolist(), sampling)).log_softmax(-1)
    answer = logprobs_of(sampled)[0]
    assert answer.logprob == pytest.approx(want[sampled.token_ids_B[0]].item(), abs=1e-5)
    assert [token for token, _ in answer.top] == want.topk(6).indices.tolist()
    assert [value for _, value in answer.top] == pytest.approx(want.topk(6).values.tolist(), abs=1e-5)


def test_only_rows_that_ask_get_logprobs() -> None:
    params = [SamplingParams(), SamplingParams(num_logprobs=0)]
    sampled = draw(params, random_logits(2), [1, 1])
    assert list(logprobs_of(sampled)) == [1]
    assert logprobs_of(sampled)[1].top == []
