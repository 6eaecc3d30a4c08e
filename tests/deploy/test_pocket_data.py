"""What pocket is trained on is right: every worked solution is checked by other means than it was made by."""

from __future__ import annotations

import json
import re
from random import Random

import pytest
from pocket_training.evaluate import is_right, parse_calls
from pocket_training.mixture import SHARES, Mixture
from pocket_training.problem import Problem, plain

NUM_PROBLEMS = 300
EQUATION = re.compile(r"(\d+(?: [+×-] \d+)+) = (-?\d+)")
AGENT_TEMPLATE = "Tools:\n{tool_descs}\nCall them."


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture(AGENT_TEMPLATE)


def drawn(mixture: Mixture, maker: str, *, held_out: bool = False) -> list[Problem]:
    rng = Random(3)
    return [mixture.draw(rng, maker, held_out=held_out) for _ in range(NUM_PROBLEMS)]


def asked(problem: Problem) -> str:
    return str(next(turn["content"] for turn in problem.messages if turn["role"] == "user"))


@pytest.mark.parametrize("maker", ["add", "subtract", "multiply", "sum"])
def test_every_equation_in_the_thoughts_and_the_answer_holds(mixture: Mixture, maker: str) -> None:
    for problem in drawn(mixture, maker):
        equations = EQUATION.findall(f"{problem.thinking}\n{problem.expected}")
        assert len(equations) >= 2
        for left, right in equations:
            assert eval(left.replace("×", "*")) == int(right)


@pytest.mark.parametrize("maker", ["add", "subtract", "multiply", "sum"])
def test_an_arithmetic_answer_is_about_the_numbers_asked_for(mixture: Mixture, maker: str) -> None:
    for problem in drawn(mixture, maker):
        in_question = sorted(map(int, re.findall(r"\d+", asked(problem))))
        in_answer = sorted(map(int, re.findall(r"\d+", problem.expected.split("=")[0])))
        assert in_question == in_answer


def test_written_digits_are_those_of_the_result(mixture: Mixture) -> None:
    for problem in [*drawn(mixture, "add"), *drawn(mixture, "subtract")]:
        digits = "".join(reversed(re.findall(r"write (\d)", problem.thinking)))
        assert int(digits) == abs(int(problem.expected.split(" = ")[1]))


def test_sorted_lists_are_sorted_and_every_choice_holds(mixture: Mixture) -> None:
    for problem in drawn(mixture, "sort"):
        numbers = list(map(int, re.findall(r"\d+", asked(problem))))
        descending = "descending" in asked(problem) or "largest to smallest" in asked(problem)
        assert list(map(int, problem.expected.split(", "))) == sorted(numbers, reverse=descending)
        choose = max if descending else min
        for best, other, chosen in re.findall(r"(?=\b(\d+) or (\d+): (\d+))", problem.thinking):
            assert int(chosen) == choose(int(best), int(other))


def test_reversed_words_read_backwards(mixture: Mixture) -> None:
    for problem in drawn(mixture, "reverse"):
        letters, backwards = re.findall(r": ([a-z ]+)", plain(problem.thinking))
        word = letters.replace(" ", "")
        assert word in asked(problem)
        assert backwards.split() == list(reversed(word))
        assert problem.expected == word[::-1]


def test_counted_letters_are_counted(mixture: Mixture) -> None:
    for problem in drawn(mixture, "count"):
        letter, shown, total = re.search(r"\ncount (\w): (.*), so (\d+)", plain(problem.thinking)).groups()
        word = re.sub(r"[ \d]", "", shown)
        assert re.search(rf"\b{word}\b", asked(problem))
        assert word.count(letter) == int(total)
        assert problem.expected == f"The letter {letter} appears {total} time{'s' if int(total) != 1 else ''}."


@pytest.mark.parametrize("maker", ["tool_call", "tool_pair"])
def test_calls_name_an_offered_tool_with_all_its_arguments(mixture: Mixture, maker: str) -> None:
    for problem in drawn(mixture, maker):
        listed = problem.tools or [
            json.loads(line) for line in problem.messages[0]["content"].splitlines() if line.startswith("{")
        ]
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in listed}
        for call in parse_calls(problem.expected) or []:
            assert list(call["arguments"]) == schemas[call["name"]]["required"]


def test_the_split_is_by_content_and_every_maker_has_both_sides(mixture: Mixture) -> None:
    for maker in SHARES:
        trained = {key for problem in drawn(mixture, maker) for key in problem.keys}
        tested = [set(problem.keys) for problem in drawn(mixture, maker, held_out=True)]
        assert all(keys - trained for keys in tested)


def test_a_held_out_call_is_never_part_of_a_training_conversation(mixture: Mixture) -> None:
    held_out = {key for problem in drawn(mixture, "tool_call", held_out=True) for key in problem.keys}

    for maker in ("tool_call", "tool_result", "tool_pair"):
        for problem in drawn(mixture, maker):
            assert not held_out & set(problem.keys)


def test_an_answer_counts_only_when_the_turn_has_ended(mixture: Mixture) -> None:
    problem = drawn(mixture, "add")[0]

    assert is_right(problem, f"thoughts\n</think>\n\n{problem.expected}<|im_end|>")
    assert not is_right(problem, f"thoughts\n</think>\n\n{problem.expected}")
    assert not is_right(problem, f"{problem.expected}<|im_end|>")
