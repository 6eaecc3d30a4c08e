"""Measures an engine on held-out problems, skill by skill."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from pocket_training.mixture import Mixture
from pocket_training.problem import Problem
from pocket_training.reference_engine import Sampling
from pocket_training.tokenizer import ProblemEncoder

MAX_TOKENS = 400
THINK_END = "</think>"
TURN_END = "<|im_end|>"
CALL_START, CALL_END = "<tool_call>", "</tool_call>"


class Engine(Protocol):
    """What evaluation needs of an engine."""

    def generate(self, prompts: list[list[int]], max_tokens: int, sampling: Sampling) -> list[list[int]]:
        """Tokens after each prompt, the stop token included."""
        ...


@dataclass(frozen=True)
class Miss:
    """A problem that was answered wrongly, and what was written."""

    problem: Problem
    written: str


@dataclass(frozen=True)
class SkillScore:
    """How many problems of a skill were right."""

    skill: str
    right: int
    total: int
    misses: list[Miss]

    @property
    def share(self) -> float:
        """Right answers among all."""
        return self.right / self.total


def parse_calls(answer: str) -> list[Any] | None:
    """The tool calls in an answer, or None where one is not JSON."""
    try:
        return [json.loads(part.split(CALL_END)[0]) for part in answer.split(CALL_START)[1:]]
    except json.JSONDecodeError:
        return None


def is_right(problem: Problem, written: str) -> bool:
    """Whether the turn ended, and its answer, or its calls, are the expected ones."""
    _, closed, answer = written.partition(THINK_END)
    if not closed or not answer.endswith(TURN_END):
        return False
    answer = answer.removesuffix(TURN_END).strip()
    if CALL_START in problem.expected:
        return parse_calls(answer) == parse_calls(problem.expected)
    return answer == problem.expected


def held_out_problems(
    mixture: Mixture, per_skill: int, rng: Random, dress: Callable[[Random, Problem], Problem] | None = None
) -> dict[str, list[Problem]]:
    """Different held-out problems of every skill; tool skills are counted for each prompt style."""
    problems: dict[str, dict[Any, Problem]] = {}
    for maker in [*mixture.direct, *mixture.with_tools]:
        skills = [maker] if maker in mixture.direct else [maker, f"{maker}_agent"]
        for _ in range(per_skill * 40):
            if all(len(problems.get(skill, {})) >= per_skill for skill in skills):
                break
            problem = mixture.draw(rng, maker, held_out=True)
            drawn = problems.setdefault(problem.skill, {})
            if len(drawn) < per_skill:
                drawn.setdefault(json.dumps(problem.messages), dress(rng, problem) if dress else problem)
    return {skill: list(drawn.values()) for skill, drawn in problems.items()}


def evaluate(
    engine: Engine, encoder: ProblemEncoder, problems: dict[str, list[Problem]], sampling: Sampling
) -> list[SkillScore]:
    """Scores of every skill."""
    scores = []
    for skill, each in problems.items():
        outputs = engine.generate([encoder.prompt_ids(problem) for problem in each], MAX_TOKENS, sampling)
        written = [encoder.decode(ids) for ids in outputs]
        misses = [
            Miss(problem, text) for problem, text in zip(each, written, strict=True) if not is_right(problem, text)
        ]
        scores.append(SkillScore(skill, len(each) - len(misses), len(each), misses))
    return scores


def score_table(columns: dict[str, list[SkillScore]]) -> str:
    """A Markdown table: a row a skill, a column a way of sampling."""
    lines = ["| skill | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in zip(*columns.values(), strict=True):
        cells = [f"{score.right}/{score.total} = {100 * score.share:.1f} %" for score in row]
        lines.append("| " + " | ".join([row[0].skill, *cells]) + " |")
    return "\n".join(lines)


def example_list(problems: dict[str, list[Problem]], encoder: ProblemEncoder) -> list[dict[str, Any]]:
    """Held-out problems as plain data for tests of an engine."""
    return [
        {
            "skill": skill, "messages": problem.messages, "tools": problem.tools, "expected": problem.expected,
            "expected_calls": parse_calls(problem.expected) or [], "prompt_ids": encoder.prompt_ids(problem),
        }
        for skill, each in problems.items()
        for problem in each
    ]  # fmt: skip
