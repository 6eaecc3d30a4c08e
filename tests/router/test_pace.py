"""How many prompt tokens a step takes beside decodes: what is learnt of steps, and who is held up by it."""

from __future__ import annotations

import pytest

from cluster.router.pace import LOOK_EVERY, MIN_TOKENS, MOST_LOOKS, PromptPace, StepLoad
from tests.router.fake_copy import request
from tests.router.fake_groups import DECODE_S, PROMPT_TOKEN_S, FakeGroups, num_prompt_tokens


class Steps:
    """A pace that is told of steps: `plain_s` each, and `token_s` for each of their prompt tokens."""

    def __init__(self, max_slowdown: float | None = 3.0, *, plain_s: float = 0.1, token_s: float = 0.001) -> None:
        self.pace = PromptPace(max_slowdown)
        self.plain_s, self.token_s = plain_s, token_s

    def step(self, num_decodes: int, num_prompt_tokens: int) -> None:
        self.pace.sent(StepLoad(num_decodes, num_prompt_tokens))
        self.pace.took(self.plain_s + self.token_s * num_prompt_tokens)

    def prompt(self, num_decodes: int, num_steps: int) -> list[int | None]:
        """The limits of so many steps beside which one prompt waits."""
        limits = []
        for _ in range(num_steps):
            limits.append(self.pace.limit(num_decodes, num_prompts=1))
            self.step(num_decodes, limits[-1] or 0)
        return limits


def test_a_step_takes_as_many_prompt_tokens_as_the_slowdown_allows() -> None:
    steps = Steps(max_slowdown=3.0, plain_s=0.1, token_s=0.001)

    limits = steps.prompt(num_decodes=8, num_steps=30)

    assert limits[-1] == pytest.approx(200, rel=0.05)


def test_the_first_steps_take_few_since_nobody_knows_what_they_cost() -> None:
    assert Steps().prompt(num_decodes=8, num_steps=5) == [0, MIN_TOKENS, 32, 64, 128]


def test_dear_prompt_tokens_still_come_in_small_chunks() -> None:
    assert Steps(token_s=1.0).prompt(num_decodes=8, num_steps=10)[1:] == [MIN_TOKENS] * 9


def test_a_step_without_prompts_shows_now_and_then_what_it_takes() -> None:
    limits = Steps().prompt(num_decodes=8, num_steps=3 * (LOOK_EVERY + 1))

    assert [step for step, limit in enumerate(limits) if limit == 0] == [0, LOOK_EVERY + 1, 2 * (LOOK_EVERY + 1)]


def test_what_is_known_of_a_few_decodes_does_not_hold_for_many() -> None:
    steps = Steps()
    steps.prompt(num_decodes=4, num_steps=5)

    assert steps.pace.limit(num_decodes=8, num_prompts=1)
    assert steps.pace.limit(num_decodes=9, num_prompts=1) == 0


@pytest.mark.parametrize(("num_decodes", "num_prompts"), [(0, 1), (3, 4), (8, 0)])
def test_nothing_is_held_back_where_more_wait_than_stream(num_decodes: int, num_prompts: int) -> None:
    steps = Steps()
    steps.prompt(num_decodes=8, num_steps=5)

    assert steps.pace.limit(num_decodes, num_prompts) is None


def test_without_a_bound_or_a_clock_nothing_is_held_back() -> None:
    assert Steps(max_slowdown=None).prompt(num_decodes=8, num_steps=5) == [None] * 5
    assert Steps(plain_s=0.0, token_s=0.0).prompt(num_decodes=8, num_steps=5)[1:] == [None] * 4


def test_an_outlier_hardly_moves_what_is_known() -> None:
    steps = Steps()
    before = steps.prompt(num_decodes=8, num_steps=30)[-1]
    assert before is not None

    steps.plain_s = 10.0
    steps.step(8, before)
    steps.plain_s = 0.1

    after = steps.pace.limit(num_decodes=8, num_prompts=1)
    assert after is not None
    assert after > 0.75 * before


def test_prompts_wait_for_a_look_only_so_long() -> None:
    pace = PromptPace(2.0)

    # Steps that always have other decodes than were asked for: nothing is ever learnt of them.
    limits = []
    for _ in range(3 * (MOST_LOOKS + 1)):
        limits.append(pace.limit(num_decodes=8, num_prompts=1))
        pace.sent(StepLoad(1, 0))
        pace.took(0.1)

    assert [step for step, limit in enumerate(limits) if limit] == [MOST_LOOKS, 2 * MOST_LOOKS + 1, 3 * MOST_LOOKS + 2]


def test_the_first_step_without_time_is_no_knowledge() -> None:
    steps = Steps(plain_s=0.1)
    steps.step(8, 0)
    steps.plain_s = steps.token_s = 0.0
    steps.step(8, MIN_TOKENS)

    assert steps.pace.limit(8, 1) == MIN_TOKENS


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 8])
def test_a_prompt_starts_soon_however_many_groups_stream(num_groups: int) -> None:
    copy = FakeGroups(num_groups, num_blocks=256, max_prefill_slowdown=2.5)
    for key in range(2 * num_groups):
        copy.add(request(key, [key] * 4, max_tokens=400))
    for _ in range(20):
        copy.step()

    copy.add(request("new", [7] * 40, max_tokens=1))
    for _ in range(10):
        copy.step()

    assert "new" in copy.finish


def test_a_long_prompt_does_not_hold_up_those_who_stream_in_any_group() -> None:
    copy = FakeGroups(2, num_blocks=256, max_num_batched_tokens=512, max_prefill_slowdown=2.0)
    for key in range(4):
        copy.add(request(key, [key] * 4, max_tokens=400))
    for _ in range(20):
        copy.step()

    copy.add(request("long", [7] * 900, max_tokens=2))
    first = len(copy.steps)
    while "long" not in copy.finish:
        copy.step()

    steps_s = [DECODE_S + PROMPT_TOKEN_S * max(map(num_prompt_tokens, step)) for step in copy.steps[first:]]
    assert max(steps_s) <= 2.2 * DECODE_S
    assert sum(steps_s) < 2.6 * 900 * PROMPT_TOKEN_S
