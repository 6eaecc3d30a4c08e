"""Batches without waste: problems of about one length share a group, problems of one beginning share its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from random import Random

import torch
from torch import Tensor

from pocket_training.mixture import Mixture
from pocket_training.model import FlatBatch, Group
from pocket_training.tokenizer import EncodedProblem, ProblemEncoder

PAD_ID = 0


def common_prefix(problems: list[EncodedProblem]) -> int:
    """Prompt tokens that all problems begin with, leaving each at least one of its own."""
    prompts = [problem.prompt_ids for problem in problems]
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False))
    return min(sum(1 for _ in same), min(map(len, prompts)) - 1)


@dataclass(frozen=True)
class Row:
    """A family of problems laid out as one sequence: the common beginning, then each problem's rest."""

    skills: list[str]
    problems: list[EncodedProblem]

    @cached_property
    def prefix(self) -> int:
        """Length of the common beginning; none is cut off where a problem is alone."""
        return common_prefix(self.problems) if len(self.problems) > 1 else 0

    @cached_property
    def branches(self) -> list[list[int]]:
        """Each problem's own tokens, but for the last, which is never read."""
        return [[*each.prompt_ids[self.prefix :], *each.completion_ids[:-1]] for each in self.problems]

    @cached_property
    def length(self) -> int:
        """Tokens the network reads."""
        return self.prefix + sum(map(len, self.branches))

    def mask(self, length: int) -> Tensor:
        """Who sees whom [L, L]: the past, but nothing of another branch."""
        branch_of = torch.zeros(length, dtype=torch.long)
        start = self.prefix
        for index, branch in enumerate(self.branches, start=1):
            branch_of[start : start + len(branch)] = index
            start += len(branch)
        same = branch_of[:, None] == branch_of[None, :]
        return (same | (branch_of == 0)[None, :]).tril()


@dataclass(frozen=True)
class TrainBatch:
    """A flat batch, and for every loss token the problem it belongs to."""

    flat: FlatBatch
    skills: list[str]
    problem_of_S: Tensor


class _Layout:
    """Collects rows into the lists of a flat batch."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.loss_rows: list[int] = []
        self.targets: list[int] = []
        self.problem_of: list[int] = []
        self.skills: list[str] = []

    def add(self, row: Row, length: int) -> None:
        """Append one row, padded to `length`."""
        self.ids.extend(row.problems[0].prompt_ids[: row.prefix])
        self.positions.extend(range(row.prefix))
        for skill, problem, branch in zip(row.skills, row.problems, row.branches, strict=True):
            first = len(self.ids) + len(problem.prompt_ids) - row.prefix - 1
            self.loss_rows.extend(range(first, first + len(problem.completion_ids)))
            self.targets.extend(problem.completion_ids)
            self.problem_of.extend([len(self.skills)] * len(problem.completion_ids))
            self.skills.append(skill)
            self.ids.extend(branch)
            self.positions.extend(range(row.prefix, row.prefix + len(branch)))
        self.ids.extend([PAD_ID] * (length - row.length))
        self.positions.extend(range(row.length, length))


def lay_out(groups: list[list[Row]]) -> TrainBatch:
    """Lay groups end to end, padding each row to its group's longest."""
    layout, sizes = _Layout(), []
    for rows in groups:
        length = max(row.length for row in rows)
        for row in rows:
            layout.add(row, length)
        has_branches = any(len(row.problems) > 1 for row in rows)
        mask = torch.stack([row.mask(length) for row in rows])[:, None] if has_branches else None
        sizes.append(Group(len(rows), length, mask))
    flat = FlatBatch(
        torch.tensor(layout.ids), torch.tensor(layout.positions), sizes,
        torch.tensor(layout.loss_rows), torch.tensor(layout.targets),
    )  # fmt: skip
    return TrainBatch(flat, layout.skills, torch.tensor(layout.problem_of))


def group_rows(rows: list[Row], group_tokens: int) -> list[list[Row]]:
    """Cut rows, sorted by kind and length, into groups of about `group_tokens` tokens."""
    groups: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda each: (len(each.problems), each.length)):
        group = groups[-1]
        full = row.length * (len(group) + 1) > group_tokens
        if group and (full or len(row.problems) != len(group[0].problems)):
            groups.append([])
        groups[-1].append(row)
    return groups


def train_batches(
    mixture: Mixture, encoder: ProblemEncoder, rng: Random, shares: dict[str, float], *, batch_tokens: int
) -> Iterator[TrainBatch]:
    """Endless training batches; `shares` may be changed while this runs."""
    while True:
        rows: list[Row] = []
        while sum(row.length for row in rows) < 8 * batch_tokens:
            for _ in range(8):
                family = mixture.train_family(rng, shares)
                rows.append(Row([each.skill for each in family], [encoder.encode(each) for each in family]))
        groups = group_rows(rows, batch_tokens // 8)
        rng.shuffle(groups)
        batch: list[list[Row]] = []
        for group in groups:
            batch.append(group)
            if sum(row.length for rows_ in batch for row in rows_) >= batch_tokens:
                yield lay_out(batch)
                batch = []
