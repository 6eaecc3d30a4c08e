"""One sequence: its tokens, its phase, its end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.router.sequence import FinishReason, Phase, Sequence
from tests.router.fake_copy import request

THINK_END, STOP = 40, 41


def sequence(prompt_ids: list[int] | None = None, *, max_output: int = 10, **more: Any) -> Sequence:
    prompt_ids = [1, 2, 3] if prompt_ids is None else prompt_ids
    stops = frozenset({STOP})
    return Sequence.start(
        request("a", prompt_ids, stop_token_ids=stops, think_end_id=THINK_END, **more), max_output=max_output
    )


def test_the_end_of_thought_token_starts_the_answer() -> None:
    seq = sequence(starts_thinking=True)
    seq.append(5)
    assert seq.phase is Phase.THINKING

    seq.append(THINK_END)

    assert seq.phase is Phase.ANSWER
    assert seq.finish is None


def test_a_sequence_that_does_not_start_in_thoughts_answers_at_once() -> None:
    assert sequence(starts_thinking=False).phase is Phase.ANSWER


def test_a_stop_token_is_kept_and_ends_the_sequence() -> None:
    seq = sequence()
    seq.append(STOP)

    assert (seq.output_ids, seq.finish) == ([STOP], FinishReason.STOP)


def test_a_stop_token_in_the_last_place_is_a_stop_and_not_a_length() -> None:
    seq = sequence(max_output=1)
    seq.append(STOP)

    assert seq.finish is FinishReason.STOP


def test_a_stop_token_within_thoughts_ends_the_sequence_in_thoughts() -> None:
    seq = sequence(starts_thinking=True)
    seq.append(STOP)

    assert (seq.phase, seq.finish) == (Phase.THINKING, FinishReason.STOP)


def test_the_last_allowed_token_ends_the_sequence() -> None:
    seq = sequence(max_output=2)
    seq.append(5)
    assert seq.finish is None
    seq.append(6)
    assert seq.finish is FinishReason.LENGTH


@pytest.mark.parametrize("num_pending", [0, 1, 2])
def test_tokens_in_flight_count_towards_the_last_allowed_one(num_pending: int) -> None:
    seq = sequence(max_output=3)
    seq.append(5)
    seq.num_pending = num_pending

    assert seq.can_sample_more == (1 + num_pending < 3)


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9)), st.data())
def test_a_slice_of_tokens_crosses_the_border_of_prompt_and_output(
    prompt_ids: list[int], output_ids: list[int], data: st.DataObject
) -> None:
    seq = sequence(list(prompt_ids))
    seq.output_ids = list(output_ids)
    end = data.draw(st.integers(0, seq.num_known))
    start = data.draw(st.integers(0, end))

    assert seq.token_ids(start, end) == (prompt_ids + output_ids)[start:end]
