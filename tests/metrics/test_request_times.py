"""How long requests wait, prefill, decode and stand still, as a Router's updates tell it."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from prometheus_client import CollectorRegistry

from cluster.metrics.request_times import RequestTimes
from cluster.router.sequence import FinishReason, SequenceRequest, SequenceUpdate
from workers.step import SamplingParams


class Timed:
    """Times, and a registry to read them by."""

    def __init__(self) -> None:
        self.times = RequestTimes()
        self._registry = CollectorRegistry()
        self._registry.register(self.times)

    def sum_of(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"mull_{name}_seconds_sum", labels)

    def count_of(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"mull_{name}_seconds_count", labels)


def request(key: Hashable) -> SequenceRequest:
    return SequenceRequest(key=key, prompt_ids=[1], sampling=SamplingParams(), max_tokens=9)


@pytest.fixture
def timed() -> Timed:
    return Timed()


def test_a_request_waits_until_its_first_step_is_sent_and_prefills_until_its_first_token(timed: Timed) -> None:
    times = timed.times
    times.on_added(request("a"), 100)
    # Two chunks of a prompt: the first one announces it, the second one has a token.
    times.on_updates([SequenceUpdate("a", admitted_cached_tokens=0)], sent_s=103, now_s=104)
    times.on_updates([SequenceUpdate("a", token_ids=[1])], sent_s=104, now_s=108)
    times.on_updates([SequenceUpdate("a", token_ids=[2], finish=FinishReason.STOP)], sent_s=108, now_s=115)

    assert timed.sum_of("request_queue_time") == 3
    assert timed.sum_of("request_prefill_time") == 5
    assert timed.sum_of("request_decode_time") == 7
    assert timed.count_of("recovery_pause", cause="rank_lost") == 0


def test_a_request_that_is_cancelled_in_the_queue_has_no_times(timed: Timed) -> None:
    timed.times.on_added(request("a"), 0)

    timed.times.on_ended("a", 5)

    assert [timed.count_of(f"request_{part}_time") for part in ("queue", "prefill", "decode")] == [0, 0, 0]


def test_who_had_begun_stands_still_from_the_last_step_before_a_loss_to_its_next_token(timed: Timed) -> None:
    times = timed.times
    for key in ("running", "waiting"):
        times.on_added(request(key), 0)
    times.on_updates([SequenceUpdate("running", admitted_cached_tokens=0, token_ids=[1])], sent_s=1, now_s=2)
    # Two losses in a row are one pause.
    times.on_lost(10)
    times.on_lost(20)
    both = [SequenceUpdate(key, token_ids=[2]) for key in ("running", "waiting")]
    times.on_updates(both, sent_s=21, now_s=25)
    times.on_updates(both, sent_s=25, now_s=26)

    assert timed.sum_of("recovery_pause", cause="rank_lost") == 15
    assert timed.count_of("recovery_pause", cause="rank_lost") == 1


def test_nothing_is_kept_of_requests_that_have_ended(timed: Timed) -> None:
    for key in range(100):
        timed.times.on_added(request(key), 0)
        timed.times.on_updates([SequenceUpdate(key, admitted_cached_tokens=0, token_ids=[1])], sent_s=1, now_s=2)
        timed.times.on_updates([SequenceUpdate(key, finish=FinishReason.LENGTH)], sent_s=2, now_s=3)
    timed.times.on_lost(4)

    assert timed.times.num_live == 0
    assert timed.count_of("request_decode_time") == 100
