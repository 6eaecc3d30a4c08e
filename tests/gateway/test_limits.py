"""Tenants' limits, on a clock that a test moves."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from cluster.errors import LimitReached
from cluster.gateway.limits import Allowance
from cluster.keys import TenantLimits


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_requests_fill_up_again_at_their_rate(clock: Clock) -> None:
    allowance = Allowance("acme", TenantLimits(max_requests_per_s=2), clock)
    allowance.count_request()
    allowance.count_request()

    with pytest.raises(LimitReached) as refused:
        allowance.count_request()
    assert refused.value.limit == "requests"
    assert refused.value.retry_after_s == pytest.approx(0.5)

    clock.now_s += refused.value.retry_after_s
    allowance.count_request()


def test_a_burst_is_a_seconds_requests_however_long_it_was_quiet(clock: Clock) -> None:
    allowance = Allowance("acme", TenantLimits(max_requests_per_s=3), clock)
    clock.now_s += 3600

    for _ in range(3):
        allowance.count_request()
    with pytest.raises(LimitReached):
        allowance.count_request()


def test_less_than_one_request_a_second_still_lets_one_through(clock: Clock) -> None:
    allowance = Allowance("acme", TenantLimits(max_requests_per_s=0.1), clock)
    allowance.count_request()

    with pytest.raises(LimitReached) as refused:
        allowance.count_request()
    assert refused.value.retry_after_s == pytest.approx(10)


def test_streams_count_their_generations_until_they_end(clock: Clock) -> None:
    allowance = Allowance("acme", TenantLimits(max_streams=4), clock)

    with ExitStack() as running:
        running.enter_context(allowance.streams(3))
        with pytest.raises(LimitReached, match="3 generations are under way and 2 more"), allowance.streams(2):
            pass
        running.enter_context(allowance.streams(1))
    assert allowance.num_streams == 0
    with allowance.streams(4):
        assert allowance.num_streams == 4


def test_a_refused_stream_takes_nothing(clock: Clock) -> None:
    allowance = Allowance("acme", TenantLimits(max_streams=1, max_requests_per_s=2), clock)
    with allowance.streams(1):
        for _ in range(10):
            with pytest.raises(LimitReached, match="under way"), allowance.streams(1):
                pass
        allowance.count_request()


@pytest.mark.parametrize("limit", ["prompt", "output"])
def test_tokens_over_the_limit_are_paid_back_before_the_next_request(clock: Clock, limit: str) -> None:
    limits = TenantLimits(max_prompt_tokens_per_min=600, max_output_tokens_per_min=600)
    allowance = Allowance("acme", limits, clock)
    with allowance.streams(1):
        (allowance.charge_prompt if limit == "prompt" else allowance.charge_output)(1800)

    with pytest.raises(LimitReached) as refused, allowance.streams(1):
        pass
    assert refused.value.limit == limit
    assert refused.value.retry_after_s == pytest.approx(120.1)

    clock.now_s += refused.value.retry_after_s
    with allowance.streams(1):
        pass


def test_changed_limits_keep_what_was_used(clock: Clock) -> None:
    allowance = Allowance("acme", TenantLimits(max_output_tokens_per_min=600), clock)
    allowance.charge_output(1200)

    allowance.change_limits(TenantLimits(max_output_tokens_per_min=6000))

    with allowance.streams(1):
        allowance.charge_output(6000)
    with pytest.raises(LimitReached), allowance.streams(1):
        pass


def test_without_limits_nothing_is_refused(clock: Clock) -> None:
    allowance = Allowance("acme", TenantLimits(), clock)

    with ExitStack() as running:
        for _ in range(1000):
            running.enter_context(allowance.streams(16))
            allowance.charge_output(10**9)
