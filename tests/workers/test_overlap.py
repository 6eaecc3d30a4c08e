"""A device that has plans before it is idle: tokens come when they are asked for, and nobody waits before that."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from tests.workers.engine import GREEDY, decode_steps, load, open_slot, random_prompts, run, whole_prompts
from tests.workers.tape import Tape, likeliest_without_a_look
from workers import candidates, transfers
from workers.launched import BeforeWait, Launched
from workers.runner import ModelRunner
from workers.shard import _serve_plans
from workers.step import (
    Draft,
    Prefill,
    SamplingParams,
    Score,
    Shutdown,
    StepPlan,
    StepResult,
    TokenLogprobs,
    TokenRules,
    ToRank,
)
from workers.transfers import UnderWay

PROMPTS = random_prompts([5, 9], 301, seed=2)


@dataclass
class Queue:
    """A device that is as far as it is told to be; it counts who waits for it."""

    num_launched: int = 0
    num_done: int = 0
    waits: list[int] = field(default_factory=list)
    """What was waited for while it was not done."""

    def event(self) -> QueueEvent:
        self.num_launched += 1
        return QueueEvent(self, self.num_launched)

    def fetch(self, tokens_B: Tensor) -> UnderWay:
        return UnderWay(tokens_B, torch.empty_like(tokens_B), self.event())


@dataclass
class QueueEvent:
    queue: Queue
    number: int
    is_recorded: bool = False

    def record(self) -> None:
        self.is_recorded = True

    def query(self) -> bool:
        assert self.is_recorded
        return self.queue.num_done >= self.number

    def synchronize(self) -> None:
        if not self.query():
            self.queue.waits.append(self.number)
            self.queue.num_done = self.number


def on_queue(directory: Path, graphs: str = "whole") -> tuple[ModelRunner, Queue]:
    """Its warm-up is over."""
    runner, queue = load(directory, graphs=graphs), Queue()
    runner.fetch = queue.fetch
    return runner, queue


def test_three_steps_are_launched_without_a_wait_for_any(moe_fp8: Path) -> None:
    runner, queue = on_queue(moe_fp8)
    plans = [whole_prompts(PROMPTS), *decode_steps([0, 1], 2)]
    launched = [runner.launch(plan) for plan in plans]
    assert queue.waits == []
    assert not any(step.is_done() for step in launched)
    assert [step.result().token_ids for step in launched] == run(load(moe_fp8), plans).tokens
    assert queue.waits == [1, 2, 3]


@contextmanager
def no_looks() -> Iterator[None]:
    """Nobody may need a value of a tensor, or a shape that depends on one."""

    def looked(*_: object) -> None:
        raise AssertionError("a launch looked at a value")

    with pytest.MonkeyPatch.context() as patch, Tape():
        # The GPU's own kernel finds the likeliest; torch has to look whether two are equal.
        patch.setattr(candidates, "_likeliest", likeliest_without_a_look)
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "numpy", "cpu"):
            patch.setattr(Tensor, name, looked)
        yield


@pytest.mark.parametrize("graphs", ["whole", "off"])
def test_a_launch_makes_no_value_of_a_tensor_a_number(graphs: str, moe_fp8: Path) -> None:
    runner, _ = on_queue(moe_fp8, graphs)
    steps = [runner.launch(whole_prompts(PROMPTS))]
    with no_looks():
        steps += [runner.launch(plan) for plan in decode_steps([0, 1], 3)]
    assert len({tuple(step.result().token_ids) for step in steps}) > 1


def test_a_launch_waits_for_no_logprobs_scores_penalties_and_loads(moe_fp8: Path) -> None:
    every_kind = [
        SamplingParams(temperature=0.0, num_logprobs=2),
        SamplingParams(frequency_penalty=0.5, num_logprobs=40, seed=1),
        SamplingParams(top_k=0, seed=2),
    ]
    prompts = whole_prompts(random_prompts([3, 4, 9], 301), every_kind)
    scored = [replace(prefill, score=Score(prefill.token_ids[1:], 3)) for prefill in prompts.prefills]
    plans = [replace(prompts, prefills=scored, report_loads=True), *decode_steps([0, 1, 2], 2)]
    runner, queue = on_queue(moe_fp8)
    with no_looks():
        steps = [runner.launch(plan) for plan in plans]
    assert queue.waits == []
    told = [answers(step.result()) for step in steps]
    assert told == [answers(result) for result in run(load(moe_fp8), plans).results]
    assert [len(logprobs) for _, logprobs, _, _ in told] == [2, 2, 2]
    assert [len(scores) for _, _, scores, _ in told] == [3, 0, 0]


def answers(result: StepResult) -> tuple[object, dict[int, TokenLogprobs], dict[int, list[TokenLogprobs]], object]:
    return result.token_ids, result.logprobs, result.prompt_logprobs, result.expert_loads


def test_a_chunk_that_samples_nobody_is_not_done_before_the_device_is(dense_fp8: Path) -> None:
    runner, queue = on_queue(dense_fp8)
    plan = StepPlan(1, open=[open_slot(0)], prefills=[Prefill(0, 0, PROMPTS[0], False)])
    step = runner.launch(plan)
    assert not step.is_done()
    assert step.result().token_ids == []
    assert queue.waits == [1]


def test_a_step_with_drafts_is_over_before_the_next_is_launched(dense_fp8: Path) -> None:
    runner, queue = on_queue(dense_fp8)
    runner.launch(whole_prompts(PROMPTS)).result()
    drafted = runner.launch(StepPlan(step=2, decodes=[0, 1], drafts=[Draft(0, [1, 2])]))
    assert queue.waits == [1, 2]
    assert drafted.is_done()


def test_a_slot_with_rules_is_told_of_its_token_before_the_next_is_launched(dense_fp8: Path) -> None:
    runner, queue = on_queue(dense_fp8)
    opened = open_slot(0, GREEDY, rules=TokenRules(bad_words=[[3, 4]]))
    waits_before: list[list[int]] = []
    plan = StepPlan(step=1, open=[opened], prefills=[Prefill(0, 0, PROMPTS[0], True)])
    runner.launch(plan, lambda: waits_before.append([*queue.waits]))
    assert queue.waits == [1]
    assert waits_before == [[]], "what is owed was not sent before the wait"


def test_a_late_result_tells_the_next_owner_of_a_slot_nothing(dense_fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = on_queue(dense_fp8)
    first = runner.launch(whole_prompts(PROMPTS[:1]))
    token = run(load(dense_fp8), [whole_prompts(PROMPTS[:1])]).tokens[0][0]
    opened = open_slot(0, GREEDY, rules=TokenRules(bad_words=[[token, 9]]))
    second = runner.launch(StepPlan(2, close=[0], open=[opened], prefills=[Prefill(0, 0, PROMPTS[1][:-1], False)]))
    advanced: list[list[int]] = []
    monkeypatch.setattr(runner.sampler.rules, "advance", lambda _slots, token_ids: advanced.append(token_ids))
    assert [first.result().token_ids, second.result().token_ids] == [[token], []]
    assert advanced == []


class ScriptedLink:
    """Orders come when it is their turn; what a rank does is written down."""

    def __init__(self, log: list[str], orders: list[tuple[str, ToRank]]) -> None:
        self._log, self._orders = log, deque(orders)

    def receive(self) -> ToRank:
        return self._orders.popleft()[1]

    def receive_before(self, step: Launched) -> ToRank | None:
        """The next order is here at once, or `late`, after the step."""
        assert not step.is_done(), "its result would have been sent"
        if self._orders[0][0] == "late":
            self._orders[0] = ("here", self._orders[0][1])
            return None
        return self.receive()

    def send(self, result: StepResult) -> None:
        self._log.append(f"send {result.step}")


@dataclass
class ScriptedRunner:
    """Its steps are under way until they are asked for; on a CPU they are done at once."""

    log: list[str]
    is_cpu: bool
    waits: int | None
    """The step whose launch waits for the device, in two places."""

    def launch(self, plan: StepPlan, before_wait: BeforeWait) -> Launched:
        self.log.append(f"launch {plan.step}")
        if plan.step == self.waits:
            before_wait()
            before_wait()
            self.log.append(f"wait in {plan.step}")
        return ScriptedStep(plan.step, self.is_cpu)


@dataclass
class ScriptedStep:
    step: int
    is_over: bool

    def is_done(self) -> bool:
        return self.is_over

    def result(self) -> StepResult:
        return StepResult(self.step, 0)


def served(*, is_cpu: bool, late: int | None = None, waits: int | None = None) -> list[str]:
    log: list[str] = []
    plans = [("late" if step == late else "here", StepPlan(step=step)) for step in (1, 2, 3)]
    link: Any = ScriptedLink(log, [*plans, ("here", Shutdown())])
    runner: Any = ScriptedRunner(log, is_cpu, waits)
    _serve_plans(link, runner)
    return log


def test_the_next_plan_is_launched_before_the_result_of_the_last_is_sent() -> None:
    assert served(is_cpu=False) == ["launch 1", "launch 2", "send 1", "launch 3", "send 2", "send 3"]


def test_a_result_does_not_wait_for_a_plan_that_is_late() -> None:
    assert served(is_cpu=False, late=2) == ["launch 1", "send 1", "launch 2", "launch 3", "send 2", "send 3"]


def test_a_result_does_not_wait_for_what_the_next_launch_waits_for() -> None:
    want = ["launch 1", "launch 2", "send 1", "wait in 2", "launch 3", "send 2", "send 3"]
    assert served(is_cpu=False, waits=2) == want


def test_a_cpu_sends_each_result_before_it_takes_on_another_plan() -> None:
    assert served(is_cpu=True) == ["launch 1", "send 1", "launch 2", "send 2", "launch 3", "send 3"]


def test_arrays_go_to_a_gpu_from_pinned_memory_and_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def remember(name: str) -> Callable[..., Tensor]:
        def call(tensor: Tensor, *_: object, **options: object) -> Tensor:
            asked.append(f"{name} {options}")
            return tensor

        return call

    monkeypatch.setattr(Tensor, "pin_memory", remember("pin"))
    monkeypatch.setattr(Tensor, "to", remember("to"))
    transfers.to_device(torch.arange(3).numpy(), torch.device("cuda"))
    assert asked == ["pin {}", "to {'non_blocking': True}"]
