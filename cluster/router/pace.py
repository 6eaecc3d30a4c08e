"""How many prompt tokens a step takes beside decodes, so that a long prompt does not hold up those who stream.

Hop 5. Learns from the times of finished steps, which the ranks measure: what a step takes without prompts, and what a
prompt token adds to it. Pure, without a clock; of a whole copy, since its groups step together. Where steps take no
time, as in tests, nothing is held back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

MIN_TOKENS = 16
"""Prompt tokens that a step takes in any case: fewer hardly cost less."""
GROWTH = 2.0
"""Of the prompt tokens of a step, against the step before: what more of them cost is seen before they are many."""
RATE = 0.3
"""Weight of the newest step in what is learnt."""
LOOK_EVERY = 32
"""Steps with prompts after which one without shows what it takes now."""
MOST_LOOKS = 8
"""Steps that prompts wait for that, at most: they go on whatever is known."""


class StepLoad(NamedTuple):
    """What a step computes."""

    num_decodes: int
    """Of all groups."""
    num_prompt_tokens: int
    """Of the group with the most: the others wait for it."""


class PromptPace:
    """Follows the steps of one copy."""

    def __init__(self, max_slowdown: float | None) -> None:
        """How many times longer prompts may make a step for those who decode; None: as much as its budget."""
        self._max_slowdown = max_slowdown
        self._in_flight: deque[StepLoad] = deque()
        self._plain_s: float | None = None
        """Of a step without prompts; None: not known."""
        self._num_plain_decodes = 0
        """Decodes in that step."""
        self._num_since_plain = 0
        self._token_s: float | None = None
        """What a prompt token adds."""
        self._num_tokens = MIN_TOKENS
        """That the last step with prompts had, or could always have had."""
        self._num_looks = 0
        """Steps in a row that prompts have waited for."""

    @property
    def is_limiting(self) -> bool:
        """`limit` may give one."""
        return self._max_slowdown is not None

    def limit(self, num_decodes: int, num_prompts: int) -> int | None:
        """Prompt tokens of the next step's groups; None: their whole budget.

        Where more wait for their first token than have had it, that goes first: a burst is not strung out.
        """
        if self._max_slowdown is None or not 0 < num_prompts <= num_decodes:
            return None
        if self.must_look(num_decodes) and self._num_looks < MOST_LOOKS:
            self._num_looks += 1
            return 0  # the next steps show it
        self._num_looks = 0
        if not self._plain_s:
            return None
        if not self._token_s:
            return MIN_TOKENS
        affordable = (self._max_slowdown - 1) * self._plain_s / self._token_s
        return max(MIN_TOKENS, int(min(affordable, GROWTH * self._num_tokens)))

    def must_look(self, num_decodes: int) -> bool:
        """What a step without prompts takes for so many decodes is not known, or not any more."""
        return self._plain_s is None or self._num_since_plain >= LOOK_EVERY or not self._is_like(num_decodes)

    def sent(self, load: StepLoad) -> None:
        """A step is under way."""
        self._in_flight.append(load)
        self._num_since_plain = self._num_since_plain + 1 if load.num_prompt_tokens else 0
        if load.num_prompt_tokens:
            self._num_tokens = max(MIN_TOKENS, load.num_prompt_tokens)

    def took(self, seconds: float) -> None:
        """The oldest step under way has."""
        load = self._in_flight.popleft()
        if not load.num_decodes:
            return
        if not load.num_prompt_tokens:
            known = self._plain_s if self._is_like(load.num_decodes) else None
            self._plain_s, self._num_plain_decodes = _learn(known, seconds), load.num_decodes
        elif self._plain_s is not None and load.num_prompt_tokens >= MIN_TOKENS:
            # What costs nothing is measured wrongly: a share of a whole step's tokens is the least.
            added_s = max(seconds - self._plain_s, 0.1 * seconds)
            self._token_s = _learn(self._token_s, added_s / load.num_prompt_tokens)

    def took_alike(self, first_s: float, growth_s: float, count: int) -> None:
        """So many steps like the oldest one under way have, each by `growth_s` longer than the one before.

        Others like them were sent in their places. None of them has prompts. For the planner, which knows many at once.
        """
        load = self._in_flight[0]
        done = 0
        while done < count and (done < 2 or not self._follows(first_s + done * growth_s, growth_s)):
            self.took(first_s + done * growth_s)
            self.sent(load)
            done += 1
        if self._plain_s and done < count:
            self._plain_s = _learn_alike(self._plain_s, first_s + (count - 1) * growth_s, growth_s, count - done)

    def are_under_way(self, loads: Iterable[StepLoad]) -> None:
        """These steps are, and no others: for the planner, which knows many steps at once."""
        self._in_flight = deque(loads)

    def lost(self) -> None:
        """Steps under way have no results any more."""
        self._in_flight.clear()

    def _follows(self, seconds: float, growth_s: float) -> bool:
        """Steps from this one on are no outliers, and so much alike that they can be learnt together."""
        known = self._plain_s
        return known is not None and 0.5 < seconds / known < 2.0 and growth_s < 1e-4 * seconds

    def _is_like(self, num_decodes: int) -> bool:
        """What is known of steps without prompts holds for so many decodes, more or less."""
        return self._num_plain_decodes <= 2 * num_decodes and num_decodes <= 2 * self._num_plain_decodes


def _learn(known: float | None, new: float) -> float:
    """Towards the new value, as if it were at most twice or half of what is known: a busy machine has outliers."""
    if not known:
        return new
    return known * math.pow(min(max(new / known, 0.5), 2.0), RATE)


def _learn_alike(known: float, last_s: float, growth_s: float, count: int) -> float:
    """`_learn` of so many steps, of which each was by `growth_s` longer than the one before.

    In logarithms it is a mean with weights that fall by `1 - RATE` with each step; they are of `last_s` times (1 - i x)
    for small x, so that the first two terms of its series are enough.
    """
    keeps = (1 - RATE) ** count
    x = growth_s / last_s
    place = min(count, len(_MOMENTS) - 1)
    first, second = _MOMENTS[place]
    return math.exp(keeps * math.log(known) + (1 - keeps) * math.log(last_s) - x * first - x * x / 2 * second)


def _moments(most: int) -> list[tuple[float, float]]:
    """For each number of steps, the sums of i and of i², weighted as `_learn` weighs the step i before the last."""
    sums, first, second = [(0.0, 0.0)], 0.0, 0.0
    for index in range(most):
        weight = RATE * (1 - RATE) ** index
        first, second = first + weight * index, second + weight * index * index
        sums.append((first, second))
    return sums


_MOMENTS = _moments(128)
"""Behind so many steps nothing changes any more."""
