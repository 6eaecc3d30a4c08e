"""Whatever arrives, is cancelled or preempted: the books stay right, and each gets the tokens it would get alone."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidRequest, Overloaded, PromptTooLong
from cluster.router.host_tier import HostPlan
from cluster.router.sequence import FinishReason, SequenceRequest
from tests.router.fake_copy import FakeCopy, request
from workers.step import SamplingParams

VOCAB_SIZE = 8
SHARED_PREFIX = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5]
small, few = st.integers(1, 12), st.integers(1, 3)


@dataclass(frozen=True)
class Cancel:
    index: int


@dataclass(frozen=True)
class SetBudget:
    index: int
    thinking_budget: int


@dataclass(frozen=True)
class LoseRanks:
    pass


@dataclass(frozen=True)
class Send:
    pass


@dataclass(frozen=True)
class Receive:
    pass


@st.composite
def tight_copies(draw: st.DrawFn) -> dict[str, Any]:
    max_num_seqs = draw(st.integers(1, 5))
    return {
        "num_blocks": draw(st.integers(2, 14)),
        "block_size": draw(st.integers(1, 4)),
        "enable_prefix_cache": draw(st.booleans()),
        "vocab_size": VOCAB_SIZE,
        "max_model_len": draw(st.integers(4, 40)),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs + draw(st.integers(0, 10)),
        "max_waiting": draw(st.integers(0, 20)),
        "max_in_flight": draw(st.integers(1, 3)),
        "num_speculative_tokens": draw(st.sampled_from([0, 1, 5])),
        "reach": draw(st.sampled_from([None, 1, 2])),
        "host": draw(
            st.one_of(st.none(), st.builds(HostPlan, num_blocks=small, least_blocks=few, blocks_per_step=few))
        ),
    }


@st.composite
def arrivals(draw: st.DrawFn) -> dict[str, Any]:
    prefix = SHARED_PREFIX[: draw(st.integers(0, len(SHARED_PREFIX)))]
    tail = draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6))
    return {
        "prompt_ids": (prefix + tail) or [0],
        "max_tokens": draw(st.integers(1, 20)),
        "stop_token_ids": draw(st.sampled_from([frozenset(), frozenset({0})])),
        "starts_thinking": draw(st.booleans()),
        "think_end_id": 1,
        "thinking_budget": draw(st.one_of(st.none(), st.integers(0, 10))),
        "close_thinking_ids": [6, 7, 1, 5][draw(st.integers(0, 2)) : draw(st.integers(3, 4))],
        "min_tokens": draw(st.integers(0, 4)),
        "priority": draw(st.sampled_from([0, 0, 1, -1])),
        "bad_words": draw(st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=3), max_size=2)),
        "num_prompt_logprobs": draw(st.sampled_from([None, None, 0, 1])),
        "cache_salt": draw(st.sampled_from(["", "tenant"])),
        "sampling": SamplingParams(
            seed=draw(st.integers(0, 1)),
            presence_penalty=draw(st.sampled_from([0.0, 1.0])),
            num_logprobs=draw(st.sampled_from([None, 1])),
        ),
    }


bursts = st.lists(arrivals(), min_size=3, max_size=12)
moves = st.lists(
    st.one_of(
        st.just(Send()),
        st.just(Receive()),
        st.just(Send()),
        arrivals(),
        st.builds(Cancel, st.integers(0, 20)),
        st.builds(SetBudget, st.integers(0, 20), st.integers(0, 10)),
        st.just(LoseRanks()),
    ),
    min_size=10,
    max_size=60,
)


def make_move(copy: FakeCopy, move: object) -> None:
    match move:
        case Send():
            copy.send()
        case Receive():
            if copy.in_flight:
                copy.receive()
        case LoseRanks():
            copy.lose_ranks()
        case Cancel(index):
            if index in copy.requests:
                copy.cancel(index)
        case SetBudget(index, thinking_budget):
            if index in copy.requests:
                copy.set_budget(index, thinking_budget)
        case dict():
            offer(copy, request(len(copy.requests), **move))


def offer(copy: FakeCopy, new: SequenceRequest) -> None:
    """Add it, unless the copy has a reason to refuse."""
    try:
        copy.add(new)
    except PromptTooLong:
        assert len(new.prompt_ids) >= copy.scheduler.context_limit
    except Overloaded:
        assert len(copy.scheduler.sequences) == copy.config.max_num_seqs + copy.config.max_waiting


def assert_as_alone(copy: FakeCopy, key: Hashable) -> None:
    """A finished sequence has the tokens of a lonely run, a cancelled one the first of them; logprobs go with them."""
    token_ids, finish = copy.alone(key)
    if copy.finish[key] is FinishReason.CANCELLED:
        assert copy.token_ids[key] == token_ids[: len(copy.token_ids[key])]
    else:
        assert (copy.token_ids[key], copy.finish[key]) == (token_ids, finish)
    asked = copy.requests[key]
    if asked.num_prompt_logprobs is not None and copy.token_ids[key]:
        scores = [entry.logprob for entry in copy.prompt_logprobs.get(key, [])]
        assert scores == [-float(token_id) for token_id in asked.prompt_ids[1:]]
    asks_logprobs = copy.requests[key].sampling.num_logprobs is not None
    expected = [-float(token_id) for token_id in copy.token_ids[key]] if asks_logprobs else []
    got = [entry.logprob for entry in copy.logprobs[key]]
    # Forced tokens had no choice: their logprob is 0.
    assert len(got) == len(expected)
    assert sum(a != b for a, b in zip(got, expected, strict=True)) <= len(copy.forced.get(key, []))


def num_prompt_prefixes(copy: FakeCopy) -> int:
    """Distinct prefixes of whole blocks among all prompts."""
    size = copy.blocks.block_size
    return len(
        {
            (asked.cache_salt, tuple(asked.prompt_ids[:end]))
            for asked in copy.requests.values()
            for end in range(size, len(asked.prompt_ids) + 1, size)
        }
    )


@settings(max_examples=400, deadline=None)
@given(tight_copies(), bursts, moves)
def test_every_sequence_gets_what_it_would_get_alone_and_all_blocks_come_back(
    setting: dict[str, Any], burst: list[dict[str, Any]], script: list[object]
) -> None:
    copy = FakeCopy(**setting)

    for move in [*burst, *script]:
        make_move(copy, move)
    copy.run()

    assert set(copy.finish) == set(copy.requests)
    for key in copy.finish:
        assert_as_alone(copy, key)
    assert copy.blocks.num_free == copy.blocks.num_blocks
    assert copy.blocks.num_cached <= num_prompt_prefixes(copy), "something else than prompts is left in the cache"
    event("thoughts closed" if copy.forced else "no thoughts closed")
    event("drafts accepted" if copy.scheduler.stats.accepted_tokens_total else "no drafts accepted")
    event("preempted" if copy.scheduler.num_preempted_total else "not preempted")
    host = copy.blocks.host
    if host is not None:
        assert host.num_reading == 0
        assert host.num_used <= num_prompt_prefixes(copy), "something else than prompts is left in the host's memory"
    event("brought back from the host" if copy.scheduler.stats.fetched_tokens_total else "nothing brought back")
    event("prefix hit" if copy.scheduler.stats.prefix_hit_tokens_total else "no prefix hit")


@settings(max_examples=200, deadline=None)
@given(tight_copies(), arrivals(), st.integers(0, 20))
def test_a_sequence_that_comes_with_output_goes_on_as_if_it_had_never_stopped(
    setting: dict[str, Any], asked: dict[str, Any], num_known: int
) -> None:
    copy = FakeCopy(**setting)
    offer(copy, request(0, **asked))
    copy.run()
    assume(copy.token_ids.get(0))
    known = copy.token_ids[0][:num_known]
    assume(len(known) < len(copy.token_ids[0]))

    elsewhere = FakeCopy(**setting)
    elsewhere.add(request(0, **asked, output_ids=known))
    elsewhere.run()

    assert known + elsewhere.token_ids[0] == copy.token_ids[0]
    assert elsewhere.finish[0] is copy.finish[0]
    event("thoughts closed" if copy.forced else "no thoughts closed")


@settings(max_examples=100, deadline=None)
@given(tight_copies(), arrivals())
def test_nothing_can_follow_an_output_that_has_ended(setting: dict[str, Any], asked: dict[str, Any]) -> None:
    copy = FakeCopy(**setting)
    offer(copy, request(0, **asked))
    copy.run()
    assume(copy.token_ids.get(0))

    with pytest.raises(InvalidRequest, match="nothing can follow") as refused:
        copy.scheduler.add(request(1, **asked, output_ids=copy.token_ids[0]))
    assert refused.value.field == "resume"
