"""What is found again of prompts that were computed before."""

from __future__ import annotations

import pytest

from tests.router.fake_copy import PROMPT, FakeCopy, request
from workers.step import Prefill


def test_the_full_blocks_of_a_finished_prompt_are_found_by_the_next() -> None:
    copy = FakeCopy(block_size=4)
    copy.add(request("first", PROMPT))
    copy.run()
    copy.add(request("second", [*PROMPT, 1, 2]))

    plan = copy.step()

    assert plan is not None
    assert plan.prefills == [Prefill(plan.open[0].slot, 8, [PROMPT[8], 1, 2], True)]
    assert copy.cached_tokens == {"first": 0, "second": 8}
    stats = copy.scheduler.stats
    assert (stats.prefix_query_tokens_total, stats.prefix_hit_tokens_total) == (20, 8)


def test_a_prompt_is_found_in_the_plan_after_the_one_that_computes_it() -> None:
    copy = FakeCopy(block_size=4, max_in_flight=2)
    copy.add(request("first", PROMPT, max_tokens=9))
    copy.send()
    copy.add(request("second", PROMPT, max_tokens=9))
    copy.send()

    copy.run()

    assert copy.cached_tokens["second"] == 8
    assert copy.token_ids["second"] == copy.alone("second")[0]


def test_a_head_that_was_refused_comes_as_soon_as_its_prefix_is_cached() -> None:
    # given: room for one of two prompts that share 48 tokens; the head is refused while nothing is cached yet
    copy = FakeCopy(num_blocks=20, block_size=4, max_num_batched_tokens=64)
    shared = list(range(1, 49))
    copy.add(request("runs", [*shared, 1], max_tokens=20))
    copy.add(request("waits", [*shared, 2], max_tokens=4))
    copy.step()
    assert copy.scheduler.num_waiting == 1

    copy.step()

    assert copy.scheduler.num_waiting == 0
    assert copy.cached_tokens["waits"] == 48


def test_a_head_that_does_not_fit_is_not_looked_up_again_while_the_cache_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = FakeCopy(num_blocks=16, block_size=4)
    copy.add(request("runs", PROMPT, max_tokens=30))
    copy.add(request("waits", [1] * 50))
    for _ in range(5):
        copy.step()
    lookups: list[int] = []
    monkeypatch.setattr(copy.blocks, "match", lambda hashes: lookups.append(len(hashes)) or [])

    for _ in range(10):
        copy.step()

    assert (copy.scheduler.num_waiting, lookups) == (1, [])


def test_the_last_prompt_token_is_computed_even_if_all_is_cached() -> None:
    copy = FakeCopy(block_size=4)
    copy.add(request("first", PROMPT[:8]))
    copy.run()
    copy.add(request("second", PROMPT[:8]))
    copy.run()

    assert copy.cached_tokens["second"] == 4
    assert copy.token_ids["second"] == copy.token_ids["first"]


def test_what_follows_the_prompt_is_neither_cached_nor_kept_over_older_prompts() -> None:
    copy = FakeCopy(num_blocks=6, block_size=4)
    copy.add(request("thinks", PROMPT, max_tokens=12, starts_thinking=True, think_end_id=49))
    copy.run()
    copy.add(request("other", [1] * 15, max_tokens=1))
    copy.run()

    assert copy.scheduler.stats.num_cached_blocks == 2 + 3
    copy.add(request("again", PROMPT, max_tokens=1))
    copy.run()
    assert copy.cached_tokens["again"] == 8


def test_requests_of_different_salts_do_not_share_blocks() -> None:
    copy = FakeCopy()
    copy.add(request("first", PROMPT, cache_salt="one"))
    copy.run()
    copy.add(request("second", PROMPT, cache_salt="two"))
    copy.run()

    assert copy.cached_tokens["second"] == 0


def test_without_prefix_cache_nothing_is_found_or_counted() -> None:
    copy = FakeCopy(enable_prefix_cache=False)
    for key in ("first", "second"):
        copy.add(request(key, PROMPT))
        copy.run()

    assert copy.cached_tokens["second"] == 0
    assert copy.scheduler.stats.prefix_query_tokens_total == 0
    assert copy.scheduler.stats.num_cached_blocks == 0
