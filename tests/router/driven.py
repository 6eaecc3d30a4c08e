"""What drives a scheduler without a model: steps there and back, and what its clients have got so far.

A step is a plan for one attention group, or a plan for each group of a copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

from cluster.router.copy_scheduler import CopyScheduler
from cluster.router.scheduler import Scheduler
from cluster.router.scheduler_config import SchedulerConfig
from cluster.router.sequence import FinishReason, SequenceRequest, SequenceUpdate
from tests.fakes import generate_alone
from workers.step import TokenLogprobs

MAX_STEPS = 100_000
Step = TypeVar("Step")
AnyScheduler = TypeVar("AnyScheduler", bound=Scheduler | CopyScheduler)


class Driven(ABC, Generic[Step, AnyScheduler]):
    """Checks after every move what must always hold."""

    def __init__(
        self, config: SchedulerConfig, scheduler: AnyScheduler, vocab_size: int, reach: int | None = None
    ) -> None:
        self.config = config
        self.scheduler = scheduler
        self.vocab_size = vocab_size
        self.reach = reach
        self.in_flight: deque[Step] = deque()
        self.steps: list[Step] = []
        self.requests: dict[Hashable, SequenceRequest] = {}
        self.token_ids: dict[Hashable, list[int]] = {}
        self.logprobs: dict[Hashable, list[TokenLogprobs]] = {}
        self.cached_tokens: dict[Hashable, int] = {}
        """In the order of admission."""
        self.finish: dict[Hashable, FinishReason] = {}
        self.forced: dict[Hashable, list[int]] = {}
        self.prompt_logprobs: dict[Hashable, list[TokenLogprobs]] = {}

    @abstractmethod
    def check_books(self) -> None:
        """Whatever the scheduler says of itself is true."""

    @abstractmethod
    def _schedule(self) -> Step | None:
        """The scheduler's next step."""

    @abstractmethod
    def _execute(self, step: Step) -> list[SequenceUpdate]:
        """Let the ranks compute a step, and apply what they answer."""

    def add(self, new: SequenceRequest) -> None:
        self.scheduler.add(new)
        self.requests[new.key] = new
        self.token_ids[new.key] = []
        self.logprobs[new.key] = []
        self.check_books()

    def cancel(self, key: Hashable) -> None:
        update = self.scheduler.cancel(key)
        assert (update is None) == (key in self.finish)
        if update is not None:
            self._take(update)
        self.check_books()

    def send(self) -> Step | None:
        """Schedule, and put the step on the way to the ranks."""
        step = self._schedule()
        if step is None:
            assert self.in_flight or not self.scheduler.has_unfinished, "nothing is under way and nothing is planned"
        else:
            self.in_flight.append(step)
            self.steps.append(step)
        assert len(self.in_flight) == self.scheduler.num_in_flight <= self.config.max_in_flight
        self.check_books()
        return step

    def receive(self) -> list[SequenceUpdate]:
        """Let the ranks execute the oldest step only now, as slow ranks would, and apply its results."""
        updates = self._execute(self.in_flight.popleft())
        for is_forced in (False, True):
            keys = [update.key for update in updates if bool(update.num_forced) is is_forced]
            assert len(set(keys)) == len(keys)
        for update in updates:
            self._take(update)
        self.check_books()
        return updates

    def step(self) -> Step | None:
        """One step there and back."""
        step = self.send()
        if step is not None:
            self.receive()
        return step

    def run(self) -> None:
        """Until all is finished, with as many steps ahead as allowed."""
        for _ in range(MAX_STEPS):
            while self.send() is not None:
                pass
            if not self.in_flight:
                return
            self.receive()
        raise AssertionError(f"not finished after {MAX_STEPS} steps: {set(self.requests) - set(self.finish)}")

    def alone(self, key: Hashable) -> tuple[list[int], FinishReason]:
        """What the request gives when nothing else runs."""
        limit = self.scheduler.context_limit
        return generate_alone(self.requests[key], context_limit=limit, vocab_size=self.vocab_size, reach=self.reach)

    def _take(self, update: SequenceUpdate) -> None:
        key = update.key
        assert key not in self.finish, f"{key} got an update after its last"
        if update.admitted_cached_tokens is not None:
            assert key not in self.cached_tokens, f"{key} was admitted twice"
            self.cached_tokens[key] = update.admitted_cached_tokens
        assert not update.token_ids or key in self.cached_tokens, f"{key} got a token before it was admitted"
        self.token_ids[key] += update.token_ids
        self.logprobs[key] += update.logprobs
        if update.prompt_logprobs:
            assert update.admitted_cached_tokens == 0, "a prompt that was scored was found in the cache, or came late"
            self.prompt_logprobs[key] = list(update.prompt_logprobs)
        if update.num_forced:
            assert update.num_forced == len(update.token_ids)
            assert key not in self.forced, f"the thoughts of {key} were closed twice"
            self.forced[key] = update.token_ids
        if update.finish is not None:
            self.finish[key] = update.finish
