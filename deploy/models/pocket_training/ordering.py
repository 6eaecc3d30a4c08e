"""Sorting a short list of numbers by repeatedly taking the smallest (or largest) one left."""

from __future__ import annotations

from random import Random

from pocket_training.problem import Problem, question

ASCENDING_PHRASES = (
    "Sort {list}.", "Sort these numbers: {list}", "Put {list} in order.", "Sort {list} from smallest to largest.",
    "Arrange {list} in ascending order.", "Please sort {list}.", "Order these numbers: {list}",
)  # fmt: skip
DESCENDING_PHRASES = (
    "Sort {list} from largest to smallest.", "Arrange {list} in descending order.",
    "Sort these numbers from largest to smallest: {list}", "Please sort {list} in descending order.",
)  # fmt: skip


def sort_working(values: list[int], *, descending: bool) -> list[str]:
    """One line a pick: what is left, and the best so far after each number."""
    lines, left = [], list(values)
    while left:
        best, chain = left[0], str(left[0])
        for value in left[1:]:
            best = max(best, value) if descending else min(best, value)
            chain += f" or {value}: {best}"
        lines.append(f"{' '.join(map(str, left))}, {'largest' if descending else 'smallest'}: {chain}")
        left.remove(best)
    return lines


def make_sort(rng: Random) -> Problem:
    """Three to five different numbers below 100."""
    values = rng.sample(range(100), rng.choice((3, 4, 4, 5, 5)))
    descending = rng.random() < 0.35
    phrase = rng.choice(DESCENDING_PHRASES if descending else ASCENDING_PHRASES)
    shown = ", ".join(map(str, values))
    ordered = sorted(values, reverse=descending)
    return Problem(
        skill="sort", keys=(f"sort {shown}",), messages=question(phrase.format(list=shown)),
        thinking="\n".join(sort_working(values, descending=descending)), answer=", ".join(map(str, ordered)),
    )  # fmt: skip
